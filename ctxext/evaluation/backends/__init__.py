"""Backends other than a model in this process: OpenAI-compatible servers, and vLLM as a library."""
