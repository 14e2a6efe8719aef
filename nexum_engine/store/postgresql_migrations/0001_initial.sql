-- The tables are those of SQLite (sqlite_migrations has the reasons). What differs:
--   * Numbers of executions come from a sequence, because many servers start executions at the same time.
--   * An index enforces that a key has at most one RUNNING or COMPLETED execution. In SQLite, the only writer checks
--     this.
--   * Text is ordered by its bytes, because the queries for ranges of keys need this order.
--   * JSON is stored as text, so that it is returned exactly as it came.
--   * No foreign key leads to a version. Versions are never deleted, and each start would lock its version's row.
--   * No foreign key leads from a node to its execution: its checks would need an index of nodes by execution.
-- Times are in milliseconds since 1970, in UTC.

CREATE TABLE workflow_versions (
    sequence bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    workflow_id text COLLATE "C" NOT NULL,
    version_hash text COLLATE "C" NOT NULL,
    ir_json text NOT NULL,
    compatibility text NOT NULL,
    registered_ms bigint NOT NULL,
    UNIQUE (workflow_id, version_hash)
);

CREATE SEQUENCE execution_numbers;

CREATE TABLE executions (
    sequence bigint PRIMARY KEY,
    execution_id text NOT NULL,
    workflow_id text COLLATE "C" NOT NULL,
    version_hash text COLLATE "C" NOT NULL,
    status text NOT NULL CHECK (status IN ('RUNNING', 'COMPLETED', 'FAILED', 'CANCELLED')),
    input_json text NOT NULL,
    idempotency_key text COLLATE "C",
    created_ms bigint NOT NULL,
    ended_ms bigint,
    error text NOT NULL DEFAULT '',
    parent_node bigint,
    child_index bigint                  -- the item's number, if the parent is a MAP node
);

CREATE UNIQUE INDEX one_execution_per_key ON executions (workflow_id, idempotency_key)
    WHERE status IN ('RUNNING', 'COMPLETED') AND idempotency_key IS NOT NULL;
CREATE INDEX executions_by_key ON executions (workflow_id, idempotency_key, sequence)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX executions_without_key ON executions (workflow_id, sequence) WHERE idempotency_key IS NULL;
CREATE INDEX executions_without_result ON executions (status, sequence) WHERE status IN ('FAILED', 'CANCELLED');
CREATE INDEX children ON executions (parent_node, sequence) WHERE parent_node IS NOT NULL;
CREATE INDEX running_children ON executions (parent_node) WHERE parent_node IS NOT NULL AND status = 'RUNNING';

CREATE TABLE nodes (
    node bigint PRIMARY KEY,            -- 1000 * the execution's sequence + the position; dependencies come first
    execution bigint GENERATED ALWAYS AS (node / 1000) STORED,
    node_id text COLLATE "C" NOT NULL,
    node_type text COLLATE "C" NOT NULL,
    dependencies text NOT NULL,         -- a JSON array of node ids
    version_hash text COLLATE "C" NOT NULL,
    status text NOT NULL
        CHECK (status IN ('PENDING', 'READY', 'RUNNING', 'WAITING', 'COMPLETED', 'SKIPPED', 'FAILED', 'CANCELLED')),
    due_ms bigint,
    queue text COLLATE "C" GENERATED ALWAYS AS
        (CASE status WHEN 'READY' THEN version_hash WHEN 'RUNNING' THEN '' END) STORED,
    task_bytes bigint,
    attempts bigint NOT NULL DEFAULT 0,
    failed_attempts bigint NOT NULL DEFAULT 0,
    lost_attempts bigint NOT NULL DEFAULT 0,
    owned boolean NOT NULL DEFAULT FALSE,
    error text NOT NULL DEFAULT '',
    event text,
    timeout_ms bigint,
    retry text,
    progress_json text,
    task_id text,
    worker_id text,
    streamed boolean,
    started_ms bigint,
    ended_ms bigint,
    outcome text,
    attempt_error text NOT NULL DEFAULT '',
    lease_loss text,
    server bigint,                      -- the server that the attempt's worker was last connected to
    output_json text,
    completed bigint,                   -- how many nodes of the execution were COMPLETED before this one
    CHECK ((status = 'COMPLETED') = (output_json IS NOT NULL))
);

-- The check is deferred to the commit, because a deletion deletes the nodes of all executions first.
ALTER TABLE executions ADD FOREIGN KEY (parent_node) REFERENCES nodes (node) DEFERRABLE INITIALLY DEFERRED;
CREATE INDEX due ON nodes (queue, due_ms, node) WHERE queue IS NOT NULL;
CREATE INDEX retries ON nodes (due_ms) WHERE status = 'READY' AND attempts > 0;
CREATE INDEX waiting ON nodes (node_type, due_ms) WHERE status = 'WAITING';

CREATE TABLE attempts (
    node bigint NOT NULL REFERENCES nodes (node),
    attempt bigint NOT NULL,
    task_id text NOT NULL,
    worker_id text NOT NULL,
    started_ms bigint NOT NULL,
    ended_ms bigint,
    outcome text NOT NULL,
    error text NOT NULL,
    PRIMARY KEY (node, attempt)
);

CREATE TABLE events (
    execution bigint NOT NULL REFERENCES executions (sequence),
    number bigint NOT NULL,
    name text NOT NULL,
    idempotency_key text NOT NULL,
    payload_json text NOT NULL,
    sent_ms bigint NOT NULL,
    node bigint,
    PRIMARY KEY (execution, number)
);

CREATE TABLE attributes (
    execution bigint NOT NULL REFERENCES executions (sequence),
    name text COLLATE "C" NOT NULL,
    value text COLLATE "C" NOT NULL,
    PRIMARY KEY (execution, name)
);
CREATE INDEX executions_by_attribute ON attributes (name, value, execution);

-- These tables are here only because the queries for both databases name them. They hold the ids of earlier versions
-- (in PostgreSQL, there are none) and the highest number of a pruned execution.
CREATE TABLE former_ids (id text PRIMARY KEY, number bigint NOT NULL);
CREATE TABLE pruned (one bigint PRIMARY KEY CHECK (one = 1), highest bigint NOT NULL);
INSERT INTO pruned VALUES (1, 0);

-- The servers that have this database open. If a server dies, the others shorten its workers' leases.
CREATE TABLE servers (
    id bigint PRIMARY KEY,
    alive_until timestamptz NOT NULL
);
