"""The output side (NExT-GPT, arXiv 2309.05519): what makes pictures of the LLM's hidden states."""
