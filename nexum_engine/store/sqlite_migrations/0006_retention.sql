-- The highest number of a pruned execution. New executions get higher numbers, so an id never leads to another
-- execution's row.
CREATE TABLE pruned (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    highest INTEGER NOT NULL
) STRICT;
INSERT INTO pruned VALUES (1, 0);
