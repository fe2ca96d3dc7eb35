"""Folders as Hugging Face publishes them: config.json, safetensors, tokenizer, chat template. Nothing in one is run.

`families` reads the configuration, `tensors` says where each parameter lies, `safetensors` maps the files, `load`
streams them onto devices, `export` writes them back.
"""
