-- Indexes that find executions by attribute, status or workflow, even among a million others. They cost a tool call no
-- page, because its execution is in none of them: the execution has a key and no attributes, and it completes.

CREATE TABLE attributes (
    execution INTEGER NOT NULL REFERENCES executions (sequence),
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (execution, name)
) STRICT, WITHOUT ROWID;

CREATE INDEX executions_by_attribute ON attributes (name, value, execution);
CREATE INDEX executions_without_result ON executions (status) WHERE status IN ('FAILED', 'CANCELLED');
CREATE INDEX executions_without_key ON executions (workflow_id) WHERE idempotency_key IS NULL;
