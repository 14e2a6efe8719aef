-- When the last heartbeat came that named the newest attempt's task. NULL if none came.
ALTER TABLE nodes ADD COLUMN heartbeat_ms bigint;
