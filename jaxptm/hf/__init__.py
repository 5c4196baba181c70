"""Hugging Face's side: weight tables that run both ways, and the files of a model directory."""
