"""Model folders as Hugging Face publishes them: config.json, safetensors, tokenizer, chat template. No code in them is
run.

`families` reads the configuration, `tensors` says where each parameter lies, `files` maps the safetensors, `load`
streams them onto devices, and `export` writes them back.
"""
