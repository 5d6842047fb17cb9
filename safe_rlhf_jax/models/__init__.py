"""Networks: a decoder, its language-model and score heads, and Hugging Face folders in and out."""
