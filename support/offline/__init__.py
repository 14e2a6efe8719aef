"""The offline web (pages of this project) and the offline model (rules). They need no network and no key."""
