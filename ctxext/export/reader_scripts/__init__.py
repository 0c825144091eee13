"""What other programs are asked with: `runner.py` and one `ask_READER.py` each, and what starts their servers.

All of it runs in that reader's environment.
"""
