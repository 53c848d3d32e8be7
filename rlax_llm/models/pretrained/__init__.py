"""Published models: config.json, weights in safetensors files."""
