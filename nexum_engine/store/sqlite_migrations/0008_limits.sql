-- The limits of a node, as JSON (Limits in limits.py). NULL if the node has no limits.
ALTER TABLE nodes ADD COLUMN limits TEXT;
CREATE INDEX limited ON nodes (node_id) WHERE status = 'RUNNING' AND limits IS NOT NULL;

-- A row for each node name with limits, because a limit counts over all executions and versions of a workflow.
CREATE TABLE limits (
    workflow_id TEXT NOT NULL,
    node_id TEXT NOT NULL,
    next_ms REAL NOT NULL,              -- when the bucket of the node's rate will be full again
    PRIMARY KEY (workflow_id, node_id)
) STRICT, WITHOUT ROWID;
