"""Words become ids and positions: tokenizers, prompts, what an LLM family wants."""
