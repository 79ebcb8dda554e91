"""Models in files, ours and everybody's.

store.py     save and load: model.safetensors and config.json, written atomically, read strictly
layouts.py   whose checkpoint is this; facts.py: what names and shapes say; plan.py: total and strict
rules_*.py   names and shapes of each layout, one table for both directions, made of forms.py
config_*.py  configs of the peers, written so that their formulas return our sizes; hf_layout.py
fields.py    values of the right kind, or an error by name
convert.py   from any layout to any other: sources.py reads, stream.py writes, folders.py makes it all or nothing
gguf*.py     one quantised file: gguf_file.py reads its head, gguf.py loads it, gguf_write.py writes it
states.py    what the peers remember, as our states
"""
