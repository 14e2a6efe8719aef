"""The offline twins: a small web of this project's pages, and a rule-based model. They need no network and no key."""
