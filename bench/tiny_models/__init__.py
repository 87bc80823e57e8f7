"""How the two small models that ship with fastdllm are made, from problems to a checkpoint."""
