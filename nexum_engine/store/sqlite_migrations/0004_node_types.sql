-- This version adds:
--   * nodes that wait for something other than a worker, and nodes that are skipped,
--   * executions that nodes start: a SUBWORKFLOW node starts one, a MAP node starts one for each item,
--   * events that clients send to an execution.

ALTER TABLE executions ADD COLUMN parent_node INTEGER REFERENCES nodes (node);
ALTER TABLE executions ADD COLUMN child_index INTEGER;      -- the item's number, if the parent is a MAP node
CREATE INDEX children ON executions (parent_node, sequence) WHERE parent_node IS NOT NULL;
CREATE INDEX running_children ON executions (parent_node) WHERE parent_node IS NOT NULL AND status = 'RUNNING';

CREATE TABLE new_nodes (
    node INTEGER PRIMARY KEY,           -- 1000 * the execution's sequence + the position; dependencies come first
    execution INTEGER GENERATED ALWAYS AS (node / 1000) VIRTUAL REFERENCES executions (sequence),
    node_id TEXT NOT NULL,
    node_type TEXT NOT NULL,
    dependencies TEXT NOT NULL,         -- a JSON array of node ids
    version_hash TEXT NOT NULL,         -- the execution's
    status TEXT NOT NULL
        CHECK (status IN ('PENDING', 'READY', 'RUNNING', 'WAITING', 'COMPLETED', 'SKIPPED', 'FAILED', 'CANCELLED')),
    due_ms INTEGER,                     -- when a READY node becomes due (NULL if owned), a RUNNING node's lease ends,
                                        -- or a WAITING node has waited long enough (NULL if it may wait for ever)
    queue TEXT GENERATED ALWAYS AS      -- what looks for it then: polls for this version, or the sweep ('')
        (CASE status WHEN 'READY' THEN version_hash WHEN 'RUNNING' THEN '' END) VIRTUAL,
    task_bytes INTEGER,                 -- of the task's input_json
    attempts INTEGER NOT NULL DEFAULT 0,
    failed_attempts INTEGER NOT NULL DEFAULT 0,
    lost_attempts INTEGER NOT NULL DEFAULT 0,
    owned INTEGER NOT NULL DEFAULT 0,   -- 1 if the process that starts the execution does the work
    error TEXT NOT NULL DEFAULT '',
    event TEXT,                         -- the name of the event that an EVENT node waits for
    timeout_ms INTEGER,                 -- how long an attempt may take, if that is limited
    retry TEXT,                         -- its retry policy, as in the IR; NULL for the default one
    progress_json TEXT,                 -- the progress that an attempt sent last
    -- The newest attempt, if any. If a node waits without an attempt, started_ms is when it began to wait.
    task_id TEXT,
    worker_id TEXT,
    streamed INTEGER,                   -- 1 if the worker kept a WorkerStream when it took the task
    started_ms INTEGER,
    ended_ms INTEGER,                   -- when the attempt ended, or the node completed
    outcome TEXT,
    attempt_error TEXT NOT NULL DEFAULT '',
    lease_loss TEXT,                    -- the outcome if the lease runs out
    output_json TEXT,
    completed INTEGER,                  -- how many nodes of the execution were COMPLETED before this one
    CHECK ((status = 'COMPLETED') = (output_json IS NOT NULL))
) STRICT;

INSERT INTO new_nodes (node, node_id, node_type, dependencies, version_hash, status, due_ms, task_bytes, attempts,
                       failed_attempts, lost_attempts, owned, error, task_id, worker_id, streamed, started_ms, ended_ms,
                       outcome, attempt_error, lease_loss, output_json)
SELECT node, node_id, node_type, dependencies, version_hash, status, due_ms, task_bytes, attempts, failed_attempts,
       lost_attempts, owned, error, task_id, worker_id, streamed, started_ms, ended_ms, outcome, attempt_error,
       lease_loss, output_json
FROM nodes ORDER BY node;

DROP TABLE nodes;
ALTER TABLE new_nodes RENAME TO nodes;

CREATE INDEX due ON nodes (queue, due_ms) WHERE queue IS NOT NULL;
-- The tasks that became READY again. Only these can be READY without being due.
CREATE INDEX retries ON nodes (due_ms) WHERE status = 'READY' AND attempts > 0;
CREATE INDEX waiting ON nodes (node_type, due_ms) WHERE status = 'WAITING';

CREATE TABLE events (
    execution INTEGER NOT NULL REFERENCES executions (sequence),
    number INTEGER NOT NULL,            -- 1, 2, 3, ... in the order in which the execution got its events
    name TEXT NOT NULL,
    idempotency_key TEXT NOT NULL,      -- '' if the sender gave none
    payload_json TEXT NOT NULL,
    sent_ms INTEGER NOT NULL,
    node INTEGER,                       -- the EVENT node that it completed; NULL while it has completed none
    PRIMARY KEY (execution, number)
) STRICT, WITHOUT ROWID;
