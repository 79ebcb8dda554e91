"""Text becomes batches: pure functions of what is on the disk, with no iterator, worker or generator to save.

    tokenizer.py   text <-> token ids; always a tokenizer.json, the byte tokenizer included
    records.py     a file becomes documents: text, JSONL, parquet
    corpus.py      corpora: the Python library's own source, a folder of files, or one; the split by name
    tokens.py      token folders: the layout of Hugging Face datatrove, plus meta.json
    foreign.py     token files of others: datatrove's, nanoGPT's, llm.c's
    prepare.py     what a recipe calls a source -> token folders, in a cache, once
    preparation.py texts -> token folders under a name, at any size; plan.py what is to be done, pipeline.py datatrove
                   doing it, cluster.py where
    train_tokenizer.py  a byte-level BPE of one's own
    order.py       which window is sample g: a keyed permutation per epoch, computed, never stored; ramps, gaps, ranks
    mixture.py     which source sample g is read from: exact shares in every 1,000, in phases
    packing.py     which documents share a row: best-fit, nothing cropped
    windows.py     windows of a token folder, four kinds: which stretches of tokens a row holds
    gather.py      stretches of tokens to arrays: tokens, targets, resets, which targets count
    feed.py        all of these as one door: from a step to the rows of its batch, and a thread that reads ahead
    yardsticks.py  what n-grams and compressors need for the same bytes

Nothing here imports torch: a batch is four numpy arrays.
"""
