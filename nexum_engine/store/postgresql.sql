-- The queries of queries.sql that PostgreSQL needs in another form, by name. See dialect() in postgresql_queries.py.

-- name: versions
SELECT workflow_id, version_hash, compatibility, registered_ms, coalesce(running, 0) AS active_executions
FROM workflow_versions
LEFT JOIN (SELECT executions.version_hash AS of_version, count(*) AS running
           FROM (SELECT execution FROM nodes WHERE queue >= ''
                 UNION SELECT execution FROM nodes WHERE status = 'WAITING' AND node_type > '') AS unfinished
           JOIN executions ON sequence = execution
           WHERE workflow_id = :workflow_id AND child_index IS NULL GROUP BY executions.version_hash) AS counted
     ON of_version = version_hash
WHERE workflow_id = :workflow_id ORDER BY sequence DESC LIMIT :limit;

-- name: add_execution
INSERT INTO executions (sequence, execution_id, workflow_id, version_hash, status, input_json, idempotency_key,
                        created_ms, ended_ms)
SELECT number, 'exec-' || number || '-' || :random, workflow_id, version_hash, :status, :input_json,
       CAST(:idempotency_key AS text), :now, CAST(:ended_ms AS bigint)
FROM workflow_versions, (SELECT nextval('execution_numbers') AS number) AS new
WHERE workflow_id = :workflow_id AND version_hash = :version_hash
RETURNING sequence, execution_id, (SELECT ir_json FROM workflow_versions
                                   WHERE workflow_id = :workflow_id AND version_hash = :version_hash) AS ir_json;

-- name: add_child
INSERT INTO executions (sequence, execution_id, workflow_id, version_hash, status, input_json, created_ms, parent_node)
SELECT number, 'exec-' || number || '-' || :random, :workflow_id, :version_hash, 'RUNNING', :input_json, :now,
       :parent_node
FROM (SELECT nextval('execution_numbers') AS number) AS new
RETURNING sequence;

-- name: add_items
INSERT INTO executions (sequence, execution_id, workflow_id, version_hash, status, input_json, created_ms, parent_node,
                        child_index)
SELECT number, 'exec-' || number || '-' || (item ->> 0), :workflow_id, :version_hash, 'RUNNING', item ->> 1, :now,
       :parent_node, index - 1
FROM (SELECT nextval('execution_numbers') AS number, item, index
      FROM json_array_elements(CAST(:items AS json)) WITH ORDINALITY AS items (item, index)) AS numbered;

-- name: matching
SELECT sequence, execution_id, workflow_id, version_hash, status, '' AS input_json, idempotency_key, created_ms,
       ended_ms, error,
       (SELECT execution_id FROM executions AS parents WHERE parents.sequence = executions.parent_node / 1000)
       AS parent_execution_id,
       (SELECT node_id FROM nodes WHERE node = parent_node) AS parent_node_id, child_index,
       (SELECT json_group_object(name, value) FROM attributes WHERE execution = sequence) AS attributes
FROM executions
WHERE sequence IN (SELECT CAST(value AS bigint) FROM json_array_elements_text(CAST(:sequences AS json)) AS value)
  AND (:with_items OR child_index IS NULL)
  AND (:workflow_id = '' OR workflow_id = :workflow_id) AND (:status = '' OR status = :status)
  AND (:since_ms = 0 OR created_ms >= :since_ms) AND (:until_ms = 0 OR created_ms < :until_ms)
  AND NOT EXISTS (SELECT 1 FROM json_each_text(CAST(:attributes AS json)) AS wanted LEFT JOIN attributes
                  ON execution = sequence AND name = wanted.key AND attributes.value = wanted.value
                  WHERE name IS NULL)
  AND (NOT :grouped OR strpos(coalesce(idempotency_key, ''), '/') = 0
       OR NOT EXISTS (SELECT 1 FROM nodes WHERE node = 1000 * sequence AND owned)
       OR (idempotency_key ~ '^[^/]+/[0-9]+$'
           AND NOT EXISTS (SELECT 1 FROM executions AS later WHERE later.workflow_id = executions.workflow_id
                           AND later.idempotency_key >= split_part(executions.idempotency_key, '/', 1) || '/'
                           AND later.idempotency_key <= split_part(executions.idempotency_key, '/', 1) || '/:'
                           AND later.sequence > executions.sequence)))
ORDER BY sequence DESC;

-- name: versions_with_task
SELECT value AS version_hash FROM json_array_elements_text(CAST(:version_hashes AS json)) AS value
WHERE EXISTS (SELECT 1 FROM nodes WHERE queue = value AND due_ms <= :now);

-- name: ended_of
SELECT sequence FROM executions
WHERE sequence IN (SELECT CAST(value AS bigint) FROM json_array_elements_text(CAST(:sequences AS json)) AS value)
  AND status <> 'RUNNING';

-- name: session_events
SELECT count(*) AS number, max(ended_ms) AS last_ms FROM executions
WHERE workflow_id = :workflow_id AND idempotency_key >= :first_key AND idempotency_key < :end_key
  AND status = 'COMPLETED' AND (idempotency_key ~ '/.*[^0-9]' OR NOT idempotency_key ~ '/[0-9]');

-- name: session_summary
-- PostgreSQL has no character NUL, and refuses to look into JSON that has one.
SELECT CAST(event -> 'summary' AS text) AS summary
FROM (SELECT sequence, CAST(replace(output_json, '\u0000', '\ufffd') AS json) AS event
      FROM executions JOIN nodes ON node = 1000 * sequence
      WHERE workflow_id = :workflow_id AND idempotency_key >= :first_key AND idempotency_key < :end_key
        AND executions.status = 'COMPLETED' AND executions.ended_ms = :last_ms) AS events
ORDER BY CASE json_typeof(event -> 'summary' -> 'number')
         WHEN 'number' THEN CAST(event -> 'summary' ->> 'number' AS numeric) END DESC NULLS LAST,
         sequence DESC
LIMIT 1;

-- name: payload_part
SELECT substr(convert_to(payload, 'UTF8'), CAST(:offset + 1 AS integer), CAST(:length AS integer)) AS data,
       octet_length(payload) AS bytes
FROM (SELECT input_json AS payload FROM executions WHERE sequence = :execution AND :node_id = ''
      UNION ALL
      SELECT output_json FROM nodes
      WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND node_id = :node_id) AS payloads;

-- name: database_size
SELECT pg_database_size(current_database()) AS bytes;

-- name: lock
SELECT 1 FROM executions WHERE sequence = (
    WITH RECURSIVE upwards AS (
        SELECT sequence, parent_node FROM executions WHERE sequence = :execution
        UNION ALL
        SELECT parents.sequence, parents.parent_node
        FROM upwards JOIN executions AS parents ON parents.sequence = upwards.parent_node / 1000
    )
    SELECT sequence FROM upwards WHERE parent_node IS NULL
) FOR NO KEY UPDATE;

-- name: beat
-- Note that this server is alive, and return how many other servers are alive.
WITH mine AS (
    INSERT INTO servers VALUES (:server, now() + make_interval(secs => :seconds))
    ON CONFLICT (id) DO UPDATE SET alive_until = excluded.alive_until
)
SELECT count(*) AS others FROM servers WHERE id <> :server AND alive_until > now();

-- name: forget_dead
DELETE FROM servers WHERE alive_until < now() - interval '1 hour';

-- name: hold_server
-- Show the other servers that this server has not ended. PostgreSQL releases the lock when this connection ends.
SELECT pg_advisory_lock_shared(:server);

-- name: forget_ended
-- Forget the servers whose process has ended: nobody holds their lock (hold_server). Forget none if PostgreSQL has just
-- started: living servers may not have taken their locks again.
DELETE FROM servers
WHERE id <> :server AND pg_postmaster_start_time() < now() - make_interval(secs => :seconds)
  AND pg_try_advisory_xact_lock(id);

-- name: leave
DELETE FROM servers WHERE id = :server;

-- name: take_over
-- If the server of a worker has died, the worker loses its tasks unless it connects to another server in time.
UPDATE nodes SET due_ms = least(due_ms, :lease_expires_ms), lease_loss = 'INTERRUPTED', server = NULL
WHERE queue = '' AND streamed AND server IS NOT NULL
  AND NOT EXISTS (SELECT 1 FROM servers WHERE id = server AND alive_until > now());
