"""A language model and the rows for it: loading, LoRA, what it says of a response, sampling."""
