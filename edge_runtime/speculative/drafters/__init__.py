"""Ways to guess what comes next: each behind the one interface of `base.py`."""
