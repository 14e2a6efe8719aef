-- For an EFFECT node whose effect must happen only once: what follows if an attempt ends without a report. The values
-- are those of Effect in records.py. For any other node: NULL, and the node is handed out again.
ALTER TABLE nodes ADD COLUMN effect text;
