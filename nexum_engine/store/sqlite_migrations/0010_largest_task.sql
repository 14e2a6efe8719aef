-- The size of the largest task that a worker of the version can receive, as the polls have said. 0 if none has come.
ALTER TABLE workflow_versions ADD COLUMN largest_task INTEGER NOT NULL DEFAULT 0;
