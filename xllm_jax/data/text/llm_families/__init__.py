"""One file for each LLM family, see `llm_family.py`."""
