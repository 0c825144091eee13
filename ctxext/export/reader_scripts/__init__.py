"""What other programs are asked with: `runner.py` and one `ask_READER.py` each, run in that reader's environment."""
