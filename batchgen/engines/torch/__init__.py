"""Our own engine: a transformers decoder over our KV pool, an EAGLE-3 head, and trees verified exactly.

Read `engine.py` first: one step is draft (`draft.py`, `forest.py`), verify (`target.py`, `verify.py`) and commit
(`kvcache.py`); `layout.py` says where a pass's tokens stand, `graphs.py` replays passes on a GPU. Imports torch,
transformers, safetensors and numpy only, so that it runs on a bare GPU machine.
"""
