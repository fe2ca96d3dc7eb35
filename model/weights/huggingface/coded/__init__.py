"""Reads matrices that published folders store as codes and scales (config.json's `quantization_config`) as the numbers
that they stand for."""
