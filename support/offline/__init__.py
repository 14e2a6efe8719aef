"""Offline: a small web of our own pages, and a rule-based model that reads them. No network, no key."""
