"""Our own engine: an unmodified transformers model, an EAGLE-3 head, and trees verified exactly.

Read `engine.py` first: one step is draft (`draft.py`, `forest.py`), verify (`target.py`, `verify.py`) and commit
(`kvcache.py`). Imports torch, transformers, safetensors and numpy only, so that it runs on a bare GPU machine.
"""
