"""Models as llama.cpp keeps them: one file with metadata, tokenizer and weights in blocks of small integers."""
