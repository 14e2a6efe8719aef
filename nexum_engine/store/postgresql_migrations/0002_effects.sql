-- What follows if an attempt at an EFFECT node, whose effect must happen only once, ends without a report: an Effect of
-- records.py. NULL: the node is handed out again.
ALTER TABLE nodes ADD COLUMN effect text;
