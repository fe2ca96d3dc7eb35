"""Matrices that published folders keep as codes and scales (config.json's `quantization_config`), read as what they
stand for."""
