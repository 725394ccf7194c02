"""The names of a saved model's files, for programs that do not load PyTorch to know them."""

WEIGHTS_FILE, MODEL_FILE = "model.safetensors", "model.json"
