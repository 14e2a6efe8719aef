-- The limits of a node, as JSON (Limits in limits.py). NULL if the node has no limits.
ALTER TABLE nodes ADD COLUMN limits text;
CREATE INDEX limited ON nodes (node_id) WHERE status = 'RUNNING' AND limits IS NOT NULL;

-- A row for each node name with limits, because a limit counts over all executions and versions of a workflow.
CREATE TABLE limits (
    workflow_id text COLLATE "C" NOT NULL,
    node_id text COLLATE "C" NOT NULL,
    next_ms double precision NOT NULL,  -- when the bucket of the node's rate will be full again
    PRIMARY KEY (workflow_id, node_id)
);
