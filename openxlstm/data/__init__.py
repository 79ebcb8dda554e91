"""Text becomes batches: pure functions of what is on the disk, with no iterator, worker or generator to save.

    tokenizer.py   text <-> token ids; always a tokenizer.json, the byte tokenizer included
    corpus.py      documents: the Python library's own source, or the text files of a folder; the split by name
    tokens.py      token folders: the layout of Hugging Face datatrove, plus meta.json
    prepare.py     corpus + tokenizer -> three token folders, once
    order.py       which window is sample g: a keyed permutation per epoch, computed, never stored
    windows.py     windows of a token folder: tokens, targets, resets, which targets count
    yardsticks.py  what n-grams and compressors need for the same bytes

Nothing here imports torch: a batch is four numpy arrays.
"""
