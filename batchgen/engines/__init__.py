"""Engines: requests in, completions out. torch, vllm and transformers models are imported on this floor only."""
