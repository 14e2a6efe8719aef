-- A commit writes whole pages, so a tool call writes a page for each table and index that it changes. This version
-- needs fewer of them:
--   * An id begins with the number of its row (store/ids.py), so no index of ids is needed.
--   * A node's id is made of its execution's number and its position, so no index of an execution's nodes is needed.
--   * A node holds its newest attempt. The table `attempts` has the earlier ones.
--   * One index has the tasks that wait for a poll and the leases that run out.

DROP INDEX one_execution_per_key;
DROP INDEX executions_by_key;
DROP INDEX tasks;
DROP INDEX leases;
ALTER TABLE executions RENAME TO old_executions;
ALTER TABLE nodes RENAME TO old_nodes;
ALTER TABLE attempts RENAME TO old_attempts;

CREATE TABLE executions (
    sequence INTEGER PRIMARY KEY,
    execution_id TEXT NOT NULL,
    workflow_id TEXT NOT NULL,
    version_hash TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('RUNNING', 'COMPLETED', 'FAILED', 'CANCELLED')),
    input_json TEXT NOT NULL,
    idempotency_key TEXT,
    created_ms INTEGER NOT NULL,
    ended_ms INTEGER,
    error TEXT NOT NULL DEFAULT '',
    FOREIGN KEY (workflow_id, version_hash) REFERENCES workflow_versions (workflow_id, version_hash)
) STRICT;

CREATE TABLE nodes (
    node INTEGER PRIMARY KEY,           -- 1000 * the execution's sequence + the position; dependencies come first
    execution INTEGER GENERATED ALWAYS AS (node / 1000) VIRTUAL REFERENCES executions (sequence),
    node_id TEXT NOT NULL,
    node_type TEXT NOT NULL,
    dependencies TEXT NOT NULL,         -- a JSON array of node ids
    version_hash TEXT NOT NULL,         -- the execution's
    status TEXT NOT NULL
        CHECK (status IN ('PENDING', 'READY', 'RUNNING', 'COMPLETED', 'FAILED', 'CANCELLED')),
    due_ms INTEGER,                     -- when a READY node becomes due (NULL if owned), or a RUNNING node's lease ends
    queue TEXT GENERATED ALWAYS AS      -- where it is looked for then: by polls for this version, or by the sweep ('')
        (CASE status WHEN 'READY' THEN version_hash WHEN 'RUNNING' THEN '' END) VIRTUAL,
    task_bytes INTEGER,                 -- of the task's input_json
    attempts INTEGER NOT NULL DEFAULT 0,
    failed_attempts INTEGER NOT NULL DEFAULT 0,
    lost_attempts INTEGER NOT NULL DEFAULT 0,
    owned INTEGER NOT NULL DEFAULT 0,   -- 1 if the process that starts the execution does the work
    error TEXT NOT NULL DEFAULT '',
    -- The newest attempt, if any.
    task_id TEXT,
    worker_id TEXT,
    streamed INTEGER,                   -- 1 if the worker kept a WorkerStream when it took the task
    started_ms INTEGER,
    ended_ms INTEGER,
    outcome TEXT,
    attempt_error TEXT NOT NULL DEFAULT '',
    lease_loss TEXT,                    -- the outcome if the lease runs out
    output_json TEXT,
    CHECK ((status = 'COMPLETED') = (output_json IS NOT NULL))
) STRICT;

CREATE TABLE attempts (
    node INTEGER NOT NULL REFERENCES nodes (node),
    attempt INTEGER NOT NULL,
    task_id TEXT NOT NULL,
    worker_id TEXT NOT NULL,
    started_ms INTEGER NOT NULL,
    ended_ms INTEGER,
    outcome TEXT NOT NULL,
    error TEXT NOT NULL,
    PRIMARY KEY (node, attempt)
) STRICT, WITHOUT ROWID;

-- The ids that earlier versions made. These ids don't begin with the number of their row.
CREATE TABLE former_ids (
    id TEXT NOT NULL PRIMARY KEY,       -- of an execution or of a task
    number INTEGER NOT NULL             -- executions.sequence or nodes.node
) STRICT, WITHOUT ROWID;

INSERT INTO executions SELECT * FROM old_executions ORDER BY sequence;

INSERT INTO nodes (node, node_id, node_type, dependencies, version_hash, status, due_ms, task_bytes, attempts,
                   failed_attempts, lost_attempts, owned, error, task_id, worker_id, streamed, started_ms, ended_ms,
                   outcome, attempt_error, lease_loss, output_json)
SELECT 1000 * sequence + position, old.node_id, node_type, dependencies, old.version_hash, old.status,
       CASE old.status WHEN 'READY' THEN ready_ms WHEN 'RUNNING' THEN lease_expires_ms END, task_bytes, attempts,
       failed_attempts, lost_attempts, owned, old.error, task_id, worker_id, streamed, started_ms, newest.ended_ms,
       outcome, coalesce(newest.error, ''), lease_loss, output_json
FROM old_executions
CROSS JOIN old_nodes AS old ON old.execution_id = old_executions.execution_id
LEFT JOIN old_attempts AS newest ON newest.execution_id = old.execution_id AND newest.node_id = old.node_id
                                AND newest.attempt = old.attempts
ORDER BY sequence, position;

INSERT INTO attempts
SELECT 1000 * sequence + position, attempt, task_id, worker_id, started_ms, earlier.ended_ms, outcome, earlier.error
FROM old_nodes AS old
CROSS JOIN old_attempts AS earlier ON earlier.execution_id = old.execution_id AND earlier.node_id = old.node_id
JOIN old_executions ON old_executions.execution_id = old.execution_id
WHERE old.attempts > 1 AND attempt < old.attempts;

INSERT INTO former_ids
SELECT execution_id, sequence FROM old_executions
UNION ALL
SELECT task_id, node FROM nodes WHERE task_id IS NOT NULL
UNION ALL
SELECT task_id, node FROM attempts
ORDER BY 1;

DROP TABLE old_attempts;
DROP TABLE old_nodes;
DROP TABLE old_executions;

CREATE INDEX executions_by_key ON executions (workflow_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX due ON nodes (queue, due_ms) WHERE queue IS NOT NULL;
-- The tasks that became READY again. Only these can be READY without being due.
CREATE INDEX retries ON nodes (due_ms) WHERE status = 'READY' AND attempts > 0;
