"""Models in files.

store.py   save and load: model.safetensors and config.json, written atomically, read strictly
"""
