-- Times are in milliseconds since 1970, in UTC.

CREATE TABLE workflow_versions (
    sequence INTEGER PRIMARY KEY,
    workflow_id TEXT NOT NULL,
    version_hash TEXT NOT NULL,
    ir_json TEXT NOT NULL,
    compatibility TEXT NOT NULL,
    registered_ms INTEGER NOT NULL,
    UNIQUE (workflow_id, version_hash)
) STRICT;

CREATE TABLE executions (
    sequence INTEGER PRIMARY KEY,
    execution_id TEXT NOT NULL UNIQUE,
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

-- Enforce at most one RUNNING or COMPLETED execution for a key.
CREATE UNIQUE INDEX one_execution_per_key ON executions (workflow_id, idempotency_key)
    WHERE status IN ('RUNNING', 'COMPLETED');
CREATE INDEX executions_by_key ON executions (workflow_id, idempotency_key, sequence)
    WHERE idempotency_key IS NOT NULL;

CREATE TABLE nodes (
    execution_id TEXT NOT NULL REFERENCES executions (execution_id),
    node_id TEXT NOT NULL,
    position INTEGER NOT NULL,          -- dependencies first
    node_type TEXT NOT NULL,
    dependencies TEXT NOT NULL,         -- a JSON array of node ids
    version_hash TEXT NOT NULL,         -- the execution's, here for the index below
    status TEXT NOT NULL
        CHECK (status IN ('PENDING', 'READY', 'RUNNING', 'COMPLETED', 'FAILED', 'CANCELLED')),
    ready_ms INTEGER,                   -- when a READY node becomes due; NULL if owned: no poll gets it
    task_bytes INTEGER,                 -- of the task's input_json
    attempts INTEGER NOT NULL DEFAULT 0,
    failed_attempts INTEGER NOT NULL DEFAULT 0,
    lost_attempts INTEGER NOT NULL DEFAULT 0,
    output_json TEXT,
    owned INTEGER NOT NULL DEFAULT 0,   -- 1 if the process that starts the execution does the work
    error TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (execution_id, node_id),
    CHECK ((status = 'COMPLETED') = (output_json IS NOT NULL))
) STRICT;

CREATE INDEX tasks ON nodes (version_hash, ready_ms) WHERE status = 'READY';

CREATE TABLE attempts (
    task_id TEXT NOT NULL PRIMARY KEY,
    execution_id TEXT NOT NULL,
    node_id TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    worker_id TEXT NOT NULL,
    streamed INTEGER NOT NULL,          -- 1 if the worker kept a WorkerStream when it took the task
    started_ms INTEGER NOT NULL,
    ended_ms INTEGER,
    outcome TEXT NOT NULL,
    error TEXT NOT NULL DEFAULT '',
    lease_expires_ms INTEGER NOT NULL,
    lease_loss TEXT NOT NULL,           -- the outcome if the lease runs out
    UNIQUE (execution_id, node_id, attempt),
    FOREIGN KEY (execution_id, node_id) REFERENCES nodes (execution_id, node_id)
) STRICT;

CREATE INDEX leases ON attempts (lease_expires_ms) WHERE outcome = 'RUNNING';
