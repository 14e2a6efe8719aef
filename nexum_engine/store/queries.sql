-- Every query of the store, by name. If PostgreSQL needs a query in another form, that form is in postgresql.sql, or
-- postgresql_queries.py makes it.
-- The nodes of an execution are numbered from 1000 * its sequence to 1000 * its sequence + 999 (ids.py).
-- Some conditions are here only to choose an index: node_type > '' is always true, and the + of +sequence keeps a
-- database from using an index of sequence. PostgreSQL plans a statement once for all parameters: for a range whose ends
-- it doesn't know, it expects few rows, and would read the whole table in the order of this index.

-- name: latest_version
-- The version of a workflow that was registered last.
SELECT version_hash, ir_json FROM workflow_versions WHERE workflow_id = :workflow_id ORDER BY sequence DESC LIMIT 1;

-- name: version
-- One version's definition.
SELECT ir_json FROM workflow_versions WHERE workflow_id = :workflow_id AND version_hash = :version_hash;

-- name: add_version
-- Register a version.
INSERT INTO workflow_versions (workflow_id, version_hash, ir_json, compatibility, registered_ms)
VALUES (:workflow_id, :version_hash, :ir_json, :compatibility, :now);

-- name: largest_task
-- The size of the largest task that a worker of a version can receive. NULL if the version is not registered.
SELECT max(largest_task) AS bytes FROM workflow_versions WHERE version_hash = :version_hash;

-- name: note_largest_task
-- Note that a worker of a version can receive tasks of this size.
UPDATE workflow_versions SET largest_task = :bytes WHERE version_hash = :version_hash AND largest_task < :bytes;

-- name: versions
-- A workflow's latest versions, the latest first, each with the number of its running executions. A running execution
-- has a READY, RUNNING or WAITING node. The executions of MAP nodes' items are not counted.
SELECT workflow_id, version_hash, compatibility, registered_ms, coalesce(running, 0) AS active_executions
FROM workflow_versions
LEFT JOIN (SELECT executions.version_hash AS of_version, count(*) AS running
           FROM (SELECT execution FROM nodes WHERE queue >= ''
                 UNION SELECT execution FROM nodes WHERE status = 'WAITING' AND node_type > '')
           CROSS JOIN executions ON sequence = execution
           WHERE workflow_id = :workflow_id AND child_index IS NULL GROUP BY of_version) AS counted ON of_version = version_hash
WHERE workflow_id = :workflow_id ORDER BY sequence DESC LIMIT :limit;

-- name: former_id
-- The number of the row with the id :id, which an earlier version of Nexum made.
SELECT number FROM former_ids WHERE id = :id;

-- name: execution_of_key
-- The latest execution of an idempotency key. If the execution is FAILED or CANCELLED, has_once says whether it has a
-- node whose effect must happen only once.
SELECT execution_id, status, input_json,
       CASE WHEN status IN ('FAILED', 'CANCELLED') THEN EXISTS (
           SELECT 1 FROM nodes WHERE node BETWEEN 1000 * sequence AND 1000 * sequence + 999 AND effect IS NOT NULL)
       END AS has_once
FROM executions
WHERE workflow_id = :workflow_id AND idempotency_key = :idempotency_key ORDER BY sequence DESC LIMIT 1;

-- name: add_execution
-- Store an execution, if its version is registered. Its id begins with its number, which no execution had before.
INSERT INTO executions (sequence, execution_id, workflow_id, version_hash, status, input_json, idempotency_key,
                        created_ms, ended_ms)
SELECT number, 'exec-' || number || '-' || :random, workflow_id, version_hash, :status, :input_json,
       :idempotency_key, :now, :ended_ms
FROM workflow_versions, (SELECT max((SELECT coalesce(max(sequence), 0) FROM executions),
                                    (SELECT highest FROM pruned WHERE one = 1)) + 1 AS number)
WHERE workflow_id = :workflow_id AND version_hash = :version_hash
RETURNING sequence, execution_id, (SELECT ir_json FROM workflow_versions
                                   WHERE workflow_id = :workflow_id AND version_hash = :version_hash) AS ir_json;

-- name: add_attribute
-- Add an attribute to a new execution.
INSERT INTO attributes (execution, name, value) VALUES (:execution, :name, :value);

-- name: add_node
-- Add a node to a new execution.
INSERT INTO nodes (node, node_id, node_type, dependencies, version_hash, status, due_ms, task_bytes, owned,
                   timeout_ms, retry, effect, limits)
VALUES (:node, :node_id, :node_type, :dependencies, :version_hash, :status, :due_ms, :task_bytes, :owned,
        :timeout_ms, :retry, :effect, :limits);

-- name: add_child
-- Store an execution that a SUBWORKFLOW node started.
INSERT INTO executions (sequence, execution_id, workflow_id, version_hash, status, input_json, created_ms, parent_node)
SELECT number, 'exec-' || number || '-' || :random, :workflow_id, :version_hash, 'RUNNING', :input_json, :now,
       :parent_node
FROM (SELECT max((SELECT coalesce(max(sequence), 0) FROM executions),
                 (SELECT highest FROM pruned WHERE one = 1)) + 1 AS number)
RETURNING sequence;

-- name: add_items
-- Store an execution for each item of a MAP node. An item is given as the random part of the id, and its JSON.
INSERT INTO executions (sequence, execution_id, workflow_id, version_hash, status, input_json, created_ms, parent_node,
                        child_index)
SELECT highest + 1 + key, 'exec-' || (highest + 1 + key) || '-' || json_extract(value, '$[0]'), :workflow_id,
       :version_hash, 'RUNNING', json_extract(value, '$[1]'), :now, :parent_node, key
FROM json_each(:items), (SELECT max((SELECT coalesce(max(sequence), 0) FROM executions),
                                    (SELECT highest FROM pruned WHERE one = 1)) AS highest);

-- name: add_item_nodes
-- Add the nodes of the executions of a MAP node's items. The nodes are due.
INSERT INTO nodes (node, node_id, node_type, dependencies, version_hash, status, due_ms, task_bytes, owned,
                   timeout_ms, retry)
SELECT 1000 * sequence, :node_id || '__' || child_index, 'MAP_SUBTASK', '[]', version_hash, 'READY', :now,
       :task_bytes + length(CAST(input_json AS BLOB)), FALSE, :timeout_ms, :retry
FROM executions WHERE parent_node = :parent_node;

-- name: add_recorded_node
-- Add a node to a new execution together with its only attempt, which has a result.
INSERT INTO nodes (node, node_id, node_type, dependencies, version_hash, status, task_bytes, attempts, owned, task_id,
                   worker_id, streamed, started_ms, ended_ms, outcome, lease_loss, output_json)
VALUES (:node, :node_id, :node_type, :dependencies, :version_hash, 'COMPLETED', :task_bytes, 1, :owned, :task_id,
        :worker_id, :streamed, :now, :now, 'COMPLETED', 'EXPIRED', :output_json);

-- name: execution
-- One execution. Its input is left out unless :with_input is true.
SELECT sequence, execution_id, workflow_id, version_hash, status,
       CASE WHEN :with_input THEN input_json ELSE '' END AS input_json, idempotency_key, created_ms, ended_ms, error,
       (SELECT execution_id FROM executions AS parents WHERE parents.sequence = executions.parent_node / 1000)
       AS parent_execution_id,
       (SELECT node_id FROM nodes WHERE node = parent_node) AS parent_node_id, child_index,
       (SELECT json_group_object(name, value) FROM attributes WHERE execution = sequence) AS attributes
FROM executions WHERE sequence = :execution AND execution_id = :execution_id;

-- name: sequence
-- An execution's number in the order of starts.
SELECT sequence FROM executions WHERE sequence = :execution AND execution_id = :execution_id;

-- name: newest
-- The executions with numbers in [first, before), newest first. Each query whose name begins with `newest` finds
-- candidates by one condition of a filter. The query `matching` checks the other conditions.
SELECT sequence FROM executions WHERE sequence >= :first AND sequence < :before ORDER BY sequence DESC LIMIT :limit;

-- name: newest_of_keys
-- The executions of a workflow whose idempotency keys are in [first_key, end_key).
SELECT sequence FROM executions
WHERE workflow_id = :workflow_id AND idempotency_key >= :first_key AND idempotency_key < :end_key
  AND +sequence >= :first AND +sequence < :before
ORDER BY sequence DESC LIMIT :limit;

-- name: newest_of_keys_of_all
-- The executions of all workflows whose idempotency keys are in [first_key, end_key).
SELECT executions.sequence FROM (SELECT DISTINCT workflow_id FROM workflow_versions) AS workflows
JOIN executions ON executions.workflow_id = workflows.workflow_id
WHERE idempotency_key >= :first_key AND idempotency_key < :end_key
  AND +executions.sequence >= :first AND +executions.sequence < :before
ORDER BY executions.sequence DESC LIMIT :limit;

-- name: newest_of_workflow
-- The executions of a workflow. One index has the executions with a key, and another index those without a key.
SELECT sequence FROM (
    SELECT sequence FROM executions WHERE workflow_id = :workflow_id AND idempotency_key IS NOT NULL
    UNION ALL
    SELECT sequence FROM executions WHERE workflow_id = :workflow_id AND idempotency_key IS NULL
) AS found WHERE +sequence >= :first AND +sequence < :before ORDER BY sequence DESC LIMIT :limit;

-- name: newest_without_result
-- The executions with the status :status, which is FAILED or CANCELLED.
SELECT sequence FROM executions
WHERE status IN ('FAILED', 'CANCELLED') AND status = :status AND sequence >= :first AND sequence < :before
ORDER BY sequence DESC LIMIT :limit;

-- name: newest_running
-- The RUNNING executions: each has a READY, RUNNING or WAITING node.
SELECT execution AS sequence FROM (SELECT node, execution FROM nodes WHERE queue IS NOT NULL
                                   UNION ALL
                                   SELECT node, execution FROM nodes WHERE status = 'WAITING' AND node_type > '') AS running
WHERE +node >= 1000 * :first AND +node < 1000 * :before
GROUP BY sequence ORDER BY sequence DESC LIMIT :limit;

-- name: newest_of_parent
-- The executions that the nodes of an execution started.
SELECT sequence FROM executions
WHERE parent_node BETWEEN 1000 * :parent AND 1000 * :parent + 999 AND +sequence >= :first AND +sequence < :before
ORDER BY sequence DESC LIMIT :limit;

-- name: newest_with_attribute
-- The executions that have an attribute.
SELECT execution AS sequence FROM attributes
WHERE name = :name AND value = :value AND execution >= :first AND execution < :before
ORDER BY execution DESC LIMIT :limit;

-- name: how_many_with_attribute
-- How many executions have an attribute. The count ends at :limit.
SELECT count(*) AS number FROM (SELECT 1 FROM attributes WHERE name = :name AND value = :value LIMIT :limit) AS found;

-- name: how_many_of_workflow
-- How many executions a workflow has. The count ends at :limit.
SELECT count(*) AS number FROM (
    SELECT 1 FROM executions WHERE workflow_id = :workflow_id AND idempotency_key IS NOT NULL
    UNION ALL
    SELECT 1 FROM executions WHERE workflow_id = :workflow_id AND idempotency_key IS NULL
    LIMIT :limit
) AS found;

-- name: started_up_to
-- The start time of the execution with the number :sequence. If the number is missing: of the last execution before it.
SELECT created_ms FROM executions WHERE sequence <= :sequence ORDER BY sequence DESC LIMIT 1;

-- name: matching
-- The executions of the list :sequences that match a filter, newest first. An empty condition matches all. Executions
-- of MAP nodes' items match only with :with_items. With :grouped, only the latest run of a session matches, and none of
-- the session's other executions. A session's executions are owned, and their keys begin with SESSION/. The key of the
-- latest run is SESSION/NUMBER, and no later execution has a key between SESSION/ and SESSION/: (in ASCII, the colon
-- follows the 9).
SELECT sequence, execution_id, workflow_id, version_hash, status, '' AS input_json, idempotency_key, created_ms,
       ended_ms, error,
       (SELECT execution_id FROM executions AS parents WHERE parents.sequence = executions.parent_node / 1000)
       AS parent_execution_id,
       (SELECT node_id FROM nodes WHERE node = parent_node) AS parent_node_id, child_index,
       (SELECT json_group_object(name, value) FROM attributes WHERE execution = sequence) AS attributes
FROM executions
WHERE sequence IN (SELECT value FROM json_each(:sequences))
  AND (:with_items OR child_index IS NULL)
  AND (:workflow_id = '' OR workflow_id = :workflow_id) AND (:status = '' OR status = :status)
  AND (:since_ms = 0 OR created_ms >= :since_ms) AND (:until_ms = 0 OR created_ms < :until_ms)
  AND NOT EXISTS (SELECT 1 FROM json_each(:attributes) AS wanted LEFT JOIN attributes
                  ON execution = sequence AND name = wanted.key AND attributes.value = wanted.value
                  WHERE name IS NULL)
  AND (NOT :grouped OR instr(coalesce(idempotency_key, ''), '/') = 0
       OR NOT EXISTS (SELECT 1 FROM nodes WHERE node = 1000 * sequence AND owned)
       OR (idempotency_key GLOB '?*/[0-9]*' AND idempotency_key NOT GLOB '*/*[^0-9]*'
           AND NOT EXISTS (SELECT 1 FROM executions AS later WHERE later.workflow_id = executions.workflow_id
                           AND later.idempotency_key
                               BETWEEN substr(executions.idempotency_key, 1, instr(executions.idempotency_key, '/'))
                               AND substr(executions.idempotency_key, 1, instr(executions.idempotency_key, '/')) || ':'
                           AND later.sequence > executions.sequence)))
ORDER BY sequence DESC;

-- name: latest_run
-- Whether a process is at work on a session's run. If the execution is not owned, it is no run, and there is no row.
SELECT status = 'RUNNING' AS is_running FROM nodes WHERE node = 1000 * :execution AND owned;

-- name: workflow_ids
-- Every workflow that has a version.
SELECT DISTINCT workflow_id FROM workflow_versions;

-- name: session_events
-- How many events a session has recorded in a workflow, and when it recorded the last one. Runs don't count as events.
SELECT count(*) AS number, max(ended_ms) AS last_ms FROM executions
WHERE workflow_id = :workflow_id AND idempotency_key >= :first_key AND idempotency_key < :end_key
  AND status = 'COMPLETED' AND (idempotency_key GLOB '*/*[^0-9]*' OR NOT idempotency_key GLOB '*/[0-9]*');

-- name: session_summary
-- The summary in the last event that a session has recorded in a workflow. Of events with the same time, the one with
-- the highest number is the last.
SELECT json_extract(output_json, '$.summary') AS summary FROM executions JOIN nodes ON node = 1000 * sequence
WHERE workflow_id = :workflow_id AND idempotency_key >= :first_key AND idempotency_key < :end_key
  AND executions.status = 'COMPLETED' AND executions.ended_ms = :last_ms
ORDER BY json_extract(output_json, '$.summary.number') DESC, sequence DESC LIMIT 1;

-- name: nodes
-- An execution's nodes with their outputs. The outputs of the nodes :left_out are NULL.
SELECT execution, node_id, node_type, status, error, progress_json, due_ms, limits, effect,
       CASE WHEN node_id NOT IN (SELECT value FROM json_each(:left_out)) THEN output_json END AS output_json
FROM nodes WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 ORDER BY node;

-- name: node_states
-- An execution's nodes without their outputs.
SELECT node, node_id, status, outcome FROM nodes
WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 ORDER BY node;

-- name: attempts
-- An execution's attempts: the earlier ones, and the newest of each node.
SELECT node_id, attempt, attempts.worker_id, attempts.started_ms, attempts.ended_ms, attempts.outcome, attempts.error
FROM attempts JOIN nodes ON nodes.node = attempts.node
WHERE attempts.node BETWEEN 1000 * :execution AND 1000 * :execution + 999
UNION ALL
SELECT node_id, attempts, worker_id, started_ms, ended_ms, outcome, attempt_error FROM nodes
WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND attempts > 0
ORDER BY attempt LIMIT :limit;

-- name: payload_part
-- A part of a node's recorded output, or of the execution's input if :node_id is empty, and the size of the whole.
SELECT substr(CAST(payload AS BLOB), :offset + 1, :length) AS data, length(CAST(payload AS BLOB)) AS bytes
FROM (SELECT input_json AS payload FROM executions WHERE sequence = :execution AND :node_id = ''
      UNION ALL
      SELECT output_json FROM nodes
      WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND node_id = :node_id) AS payloads;

-- name: output_bytes
-- An upper bound of the size of an execution's outputs as one JSON object: each character of a name may be escaped.
SELECT coalesce(sum(length(CAST(output_json AS BLOB)) + 2 * length(CAST(node_id AS BLOB)) + 4), 0) AS bytes
FROM nodes WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999;

-- name: payload_sizes
-- The sizes of an execution's input, under an empty name, and of each recorded output.
SELECT '' AS node_id, length(CAST(input_json AS BLOB)) AS bytes FROM executions WHERE sequence = :execution
UNION ALL
SELECT node_id, length(CAST(output_json AS BLOB)) FROM nodes
WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND status = 'COMPLETED';

-- name: frame_bytes
-- An upper bound of the size of an answer about an execution, without its input, outputs and attempts.
SELECT 4000 + length(CAST(error AS BLOB))
     + (SELECT coalesce(sum(4 * length(name) + 4 * length(value) + 20), 0) FROM attributes WHERE execution = sequence)
     + (SELECT sum(2 * length(CAST(node_id AS BLOB)) + length(CAST(nodes.error AS BLOB)) + 100) FROM nodes
        WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999) AS bytes
FROM executions WHERE sequence = :execution;

-- name: attempt_sizes
-- The size of an execution's attempts.
SELECT (SELECT coalesce(sum(length(CAST(error AS BLOB)) + 4 * length(worker_id) + 100), 0) FROM attempts
        WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999)
     + (SELECT coalesce(sum(length(CAST(attempt_error AS BLOB)) + 4 * length(worker_id) + 100), 0) FROM nodes
        WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999) AS bytes;

-- name: oldest_task
-- Of a version's tasks that are small enough for the worker, the one that has been due the longest. A long input is
-- left out. The nodes :held are skipped, because their limits hold them back.
SELECT node, execution, execution_id, node_id, node_type, dependencies, attempts, due_ms, nodes.version_hash,
       workflow_id, idempotency_key, task_bytes, progress_json, timeout_ms, effect, limits,
       CASE WHEN task_bytes <= :max_inline THEN input_json END AS input_json
FROM nodes JOIN executions ON sequence = execution
WHERE queue = :version_hash AND due_ms <= :now AND task_bytes <= :max_bytes
  AND (limits IS NULL OR node_id NOT IN (SELECT value FROM json_each(:held)))
ORDER BY due_ms, node LIMIT 1;

-- name: add_limit
-- Note that a node of a workflow has limits.
INSERT INTO limits (workflow_id, node_id, next_ms) VALUES (:workflow_id, :node_id, 0)
ON CONFLICT (workflow_id, node_id) DO NOTHING;

-- name: limit
-- When the bucket of a node's rate will be full again.
SELECT next_ms FROM limits
WHERE workflow_id = (SELECT workflow_id FROM executions WHERE sequence = :execution) AND node_id = :node_id;

-- name: lock_limit
-- When the bucket of a node's rate will be full again. PostgreSQL also locks the row, so that no other server hands out
-- a node under this limit before the commit.
SELECT next_ms FROM limits
WHERE workflow_id = (SELECT workflow_id FROM executions WHERE sequence = :execution) AND node_id = :node_id;

-- name: set_bucket
-- Store when the bucket of a node's rate will be full again.
INSERT INTO limits (workflow_id, node_id, next_ms)
SELECT workflow_id, :node_id, :next_ms FROM executions WHERE sequence = :execution
ON CONFLICT (workflow_id, node_id) DO UPDATE SET next_ms = excluded.next_ms;

-- name: running_under_limit
-- How many attempts at a node with limits are RUNNING, in all executions of the workflow.
SELECT count(*) AS running FROM nodes JOIN executions ON sequence = execution
WHERE nodes.status = 'RUNNING' AND limits IS NOT NULL AND node_id = :node_id
  AND workflow_id = (SELECT workflow_id FROM executions WHERE sequence = :execution);

-- name: versions_of_limit
-- The versions that have a due task or a READY owned node, of the workflow of an execution.
SELECT version_hash FROM workflow_versions
WHERE workflow_id = (SELECT workflow_id FROM executions WHERE sequence = :execution)
  AND ((SELECT 1 FROM nodes WHERE queue = workflow_versions.version_hash AND due_ms <= :now LIMIT 1) IS NOT NULL
       OR (SELECT 1 FROM nodes WHERE queue = workflow_versions.version_hash AND due_ms IS NULL LIMIT 1) IS NOT NULL);

-- name: versions_with_task
-- The versions in the list :version_hashes that have a due task.
SELECT value AS version_hash FROM json_each(:version_hashes) AS versions
WHERE EXISTS (SELECT 1 FROM nodes WHERE queue = versions.value AND due_ms <= :now);

-- name: ended_of
-- The executions in the list :sequences that have ended.
SELECT sequence FROM executions
WHERE sequence IN (SELECT value FROM json_each(:sequences)) AND status <> 'RUNNING';

-- name: oversized_task
-- Of a version's tasks that are too large for the worker, the one that has been due the longest.
SELECT node, task_bytes FROM nodes
WHERE queue = :version_hash AND due_ms <= :now AND task_bytes > :max_bytes
ORDER BY due_ms, node LIMIT 1;

-- name: owned_node
-- The node of an owned execution, with its newest attempt.
SELECT node, execution, execution_id, node_id, node_type, dependencies, attempts, nodes.version_hash, nodes.status,
       owned, workflow_id, idempotency_key, input_json, task_bytes, progress_json, timeout_ms, task_id, worker_id,
       effect, limits
FROM nodes JOIN executions ON sequence = execution
WHERE node = 1000 * :execution;

-- name: task_payload
-- The parts of a task's input. The parts are the same for every attempt at the node.
SELECT node_type, execution, dependencies, input_json FROM nodes JOIN executions ON sequence = execution
WHERE node = :node;

-- name: map_of_item
-- The MAP node that started the execution :item, with the node's execution, the number of items, and the item's index.
SELECT execution, executions.execution_id, node_id, dependencies, workflow_id, nodes.version_hash, idempotency_key,
       input_json,
       (SELECT child_index + 1 FROM executions AS items WHERE items.parent_node = nodes.node
        ORDER BY items.sequence DESC LIMIT 1) AS total,
       (SELECT child_index FROM executions AS item WHERE item.sequence = :item) AS child_index
FROM nodes JOIN executions ON executions.sequence = execution
WHERE node = (SELECT parent_node FROM executions AS item WHERE item.sequence = :item);

-- name: note_why_ready
-- Store in a READY node why no worker gets it.
UPDATE nodes SET error = :error WHERE node = :node AND status = 'READY' AND error <> :error;

-- name: keep_attempt
-- Copy a node's newest attempt to the table of earlier attempts, before the node is handed out again.
INSERT INTO attempts (node, attempt, task_id, worker_id, started_ms, ended_ms, outcome, error)
SELECT node, attempts, task_id, worker_id, started_ms, ended_ms, outcome, attempt_error FROM nodes WHERE node = :node;

-- name: take_task
-- Hand a READY node out as a new attempt, which has its own task id.
UPDATE nodes SET status = 'RUNNING', error = '', attempts = attempts + 1, task_id = :task_id, worker_id = :worker_id,
                 streamed = :streamed, started_ms = :now, ended_ms = NULL, outcome = 'RUNNING', attempt_error = '',
                 due_ms = :lease_expires_ms, lease_loss = 'EXPIRED', heartbeat_ms = NULL
WHERE node = :node AND status = 'READY';

-- name: recorded_outputs
-- The recorded outputs of an execution.
SELECT node_id, output_json FROM nodes
WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND status = 'COMPLETED';

-- name: attempt
-- The attempt with a task id, with its node and execution: the node's newest attempt or an earlier one.
-- `unrecorded` counts the execution's nodes that are neither recorded nor skipped.
SELECT nodes.node, execution, node_id, node_type, coalesce(earlier.attempt, attempts) AS attempt,
       coalesce(earlier.worker_id, nodes.worker_id) AS worker_id, coalesce(earlier.outcome, nodes.outcome) AS outcome,
       coalesce(earlier.error, attempt_error) AS error,
       attempts AS newest_attempt, nodes.outcome AS newest_outcome, attempt_error AS newest_error,
       streamed AS newest_streamed, nodes.worker_id AS newest_worker, failed_attempts, lost_attempts, owned,
       execution_id, executions.status AS execution_status, workflow_id, nodes.version_hash, task_bytes, timeout_ms,
       retry, effect, limits, due_ms,
       (SELECT count(*) FROM nodes AS others WHERE others.node BETWEEN 1000 * sequence AND 1000 * sequence + 999
        AND others.status NOT IN ('COMPLETED', 'SKIPPED')) AS unrecorded,
       NOT EXISTS (SELECT 1 FROM nodes AS others WHERE others.node BETWEEN 1000 * sequence AND 1000 * sequence + 999
                   AND others.node <> nodes.node) AS is_only_node
FROM nodes
JOIN executions ON sequence = execution
LEFT JOIN attempts AS earlier ON earlier.node = nodes.node AND earlier.task_id = :task_id
WHERE nodes.node = :node AND (nodes.task_id = :task_id OR earlier.task_id = :task_id);

-- name: node_output
-- A node's recorded output.
SELECT output_json FROM nodes WHERE node = :node;

-- name: record_output
-- Record a node's result, once, and the end of its newest attempt. If the attempt is UNKNOWN, this is a late report.
UPDATE nodes SET status = 'COMPLETED', output_json = :output_json, error = '',
                 outcome = 'COMPLETED', attempt_error = '', ended_ms = :now,
                 completed = (SELECT count(*) FROM nodes AS others WHERE others.status = 'COMPLETED' AND
                              others.node BETWEEN 1000 * (:node / 1000) AND 1000 * (:node / 1000) + 999)
WHERE node = :node AND attempts = :attempt
  AND (status IN ('RUNNING', 'READY') OR (status = 'WAITING' AND outcome = 'UNKNOWN'));

-- name: wait_for_children
-- End a node's newest attempt. The node now waits for the executions that it started.
UPDATE nodes SET status = 'WAITING', due_ms = NULL, error = '', outcome = 'COMPLETED', attempt_error = '',
                 ended_ms = :now
WHERE node = :node AND status IN ('RUNNING', 'READY') AND attempts = :attempt;

-- name: begin_waiting
-- Let a node wait for a time, a person or an event. The wait ends at due_ms at the latest.
UPDATE nodes SET status = 'WAITING', due_ms = :due_ms, event = :event, started_ms = :now
WHERE node = :node AND status = 'PENDING';

-- name: skip_node
-- Skip a node: no router chose it, or all nodes that it depends on are skipped.
UPDATE nodes SET status = 'SKIPPED' WHERE node = :node AND status = 'PENDING';

-- name: queued_tasks
-- Count the tasks that wait for a worker, up to a limit.
SELECT count(*) AS tasks FROM (SELECT 1 FROM nodes WHERE queue > '' LIMIT :limit) AS queued;

-- name: complete_waiting
-- Record the result of a node that waited.
UPDATE nodes SET status = 'COMPLETED', output_json = :output_json, error = '', ended_ms = :now,
                 completed = (SELECT count(*) FROM nodes AS others WHERE others.status = 'COMPLETED' AND
                              others.node BETWEEN 1000 * (:node / 1000) AND 1000 * (:node / 1000) + 999)
WHERE node = :node AND status = 'WAITING';

-- name: fail_waiting
-- Fail a node that waited.
UPDATE nodes SET status = 'FAILED', error = :error, ended_ms = :now WHERE node = :node AND status = 'WAITING';

-- name: time_out
-- End an EVENT node whose event did not come in time. The execution continues with the node on_timeout.
UPDATE nodes SET status = 'SKIPPED', outcome = 'EXPIRED', error = :error, ended_ms = :now
WHERE node = :node AND status = 'WAITING';

-- name: wait_for_person
-- End a node's newest attempt, whose effect is unknown. The node now waits for a person. :lease_loss says how the
-- attempt's lease ran out. If :lease_loss is NULL, the attempt is not resumed when its worker comes back.
UPDATE nodes SET status = 'WAITING', due_ms = NULL, error = '', outcome = 'UNKNOWN', attempt_error = :error,
                 lease_loss = :lease_loss, lost_attempts = lost_attempts + :lost, ended_ms = :now
WHERE node = :node AND attempts = :attempt
  AND (status IN ('RUNNING', 'READY') OR (status = 'WAITING' AND outcome = 'UNKNOWN'));

-- name: must_reconcile
-- From now on, let each attempt at a node first find out whether the effect has happened.
UPDATE nodes SET effect = 'MUST_RECONCILE' WHERE node = :node;

-- name: unknown_nodes
-- The nodes whose effect is unknown, the longest waiting first.
SELECT execution_id, node_id, workflow_id, nodes.ended_ms AS since_ms, attempt_error AS error, attempts AS attempt,
       worker_id, started_ms, coalesce(heartbeat_ms, 0) AS heartbeat_ms,
       CASE WHEN length(CAST(input_json AS BLOB)) <= :max_input THEN input_json ELSE '' END AS input_json
FROM nodes JOIN executions ON sequence = execution
WHERE nodes.status = 'WAITING' AND node_type = 'EFFECT' ORDER BY nodes.ended_ms, node LIMIT :limit;

-- name: add_resolution
-- Store a person's decision about a node whose effect is unknown, as the node's newest attempt.
UPDATE nodes SET attempts = attempts + 1, task_id = :task_id, worker_id = :by, started_ms = :now, ended_ms = :now,
                 outcome = :outcome, attempt_error = :error
WHERE node = :node;

-- name: hand_out_again
-- Make a node a task again, with fresh counts. A person has decided that the effect of the node has not happened.
UPDATE nodes SET status = 'READY', due_ms = CASE WHEN owned THEN NULL ELSE :due_ms END,
                 failed_attempts = 0, lost_attempts = 0,
                 effect = CASE effect WHEN 'MUST_RECONCILE' THEN 'RECONCILE' ELSE effect END
WHERE node = :node AND status = 'WAITING';

-- name: add_decision
-- Store a person's decision about a HUMAN_APPROVAL node as an attempt. The table attempts has all attempts at such a
-- node, also the newest one: the node's own started_ms is when the node began to wait.
INSERT INTO attempts (node, attempt, task_id, worker_id, started_ms, ended_ms, outcome, error)
SELECT node, (SELECT count(*) + 1 FROM attempts AS earlier WHERE earlier.node = nodes.node), :task_id, :by, started_ms,
       :now, :outcome, :error
FROM nodes WHERE node = :node;

-- name: node_at
-- A node with its execution.
SELECT node, node_id, node_type, nodes.status, execution, execution_id, workflow_id, nodes.version_hash
FROM nodes JOIN executions ON sequence = execution WHERE node = :node;

-- name: node_by_name
-- A node with its execution, by the node's name. `is_again` says whether an earlier attempt had an unknown effect.
SELECT node, node_id, node_type, nodes.status, outcome, owned, task_bytes, execution, workflow_id, nodes.version_hash,
       attempts AS attempt,
       EXISTS (SELECT 1 FROM attempts AS earlier WHERE earlier.node = nodes.node AND earlier.outcome = 'UNKNOWN')
       AS is_again
FROM nodes JOIN executions ON sequence = execution
WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND node_id = :node_id;

-- name: choices
-- The outputs of an execution's routers. Each names the target that the router chose.
SELECT node_id, output_json FROM nodes
WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND node_type = 'ROUTER' AND status = 'COMPLETED';

-- name: pending_approvals
-- The nodes that wait for a person's approval, the longest waiting first.
SELECT execution_id, node_id, workflow_id, started_ms,
       CASE WHEN length(CAST(input_json AS BLOB)) <= :max_input THEN input_json ELSE '' END AS input_json
FROM nodes JOIN executions ON sequence = execution
WHERE nodes.status = 'WAITING' AND node_type = 'HUMAN_APPROVAL' ORDER BY started_ms, node LIMIT :limit;

-- name: due_waits
-- The nodes that have waited as long as they may, the earliest first.
SELECT node, node_id, execution, workflow_id, nodes.version_hash, due_ms
FROM nodes JOIN executions ON sequence = execution
WHERE nodes.status = 'WAITING' AND node_type IN ('TIMER', 'EVENT', 'HUMAN_APPROVAL') AND due_ms <= :now
ORDER BY due_ms, node LIMIT :limit;

-- name: due_wait
-- A node, if it has waited as long as it may.
SELECT node FROM nodes WHERE node = :node AND status = 'WAITING' AND due_ms <= :now;

-- name: next_wait
-- When the next node will have waited as long as it may.
SELECT min(due_ms) AS due
FROM (SELECT min(due_ms) AS due_ms FROM nodes WHERE status = 'WAITING' AND node_type = 'TIMER'
      UNION ALL SELECT min(due_ms) FROM nodes WHERE status = 'WAITING' AND node_type = 'EVENT'
      UNION ALL SELECT min(due_ms) FROM nodes WHERE status = 'WAITING' AND node_type = 'HUMAN_APPROVAL') AS kinds;

-- name: depth
-- How deep an execution is nested: 1 if a client started it, 2 if a node of such an execution did, and so on.
WITH RECURSIVE upwards (parent, depth) AS (
    SELECT parent_node, 1 FROM executions WHERE sequence = :execution
    UNION ALL
    SELECT parent_node, depth + 1 FROM upwards JOIN executions ON sequence = parent / 1000
)
SELECT max(depth) AS depth FROM upwards;

-- name: children
-- The executions that a node started, in the order of the items.
SELECT workflow_id, input_json FROM executions WHERE parent_node = :node ORDER BY sequence;

-- name: running_child
-- A running execution that a node started.
SELECT sequence FROM executions WHERE parent_node = :node AND status = 'RUNNING' LIMIT 1;

-- name: running_children
-- The running executions that the nodes of an execution started.
SELECT sequence FROM executions
WHERE parent_node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND status = 'RUNNING' ORDER BY sequence;

-- name: item_results
-- The results of a MAP node's tasks, in the order of the items.
SELECT output_json FROM executions JOIN nodes ON node = 1000 * sequence WHERE parent_node = :node ORDER BY sequence;

-- name: item_result_bytes
-- The size of the results of a MAP node's tasks as one JSON array.
SELECT coalesce(sum(length(CAST(output_json AS BLOB)) + 1), 0) + 1 AS bytes
FROM executions JOIN nodes ON node = 1000 * sequence WHERE parent_node = :node;

-- name: last_output
-- The output of the node that completed last in an execution.
SELECT output_json FROM nodes
WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND status = 'COMPLETED'
ORDER BY completed DESC LIMIT 1;

-- name: add_event
-- Store an event that was sent to an execution.
INSERT INTO events (execution, number, name, idempotency_key, payload_json, sent_ms)
SELECT :execution, coalesce(max(number), 0) + 1, :name, :idempotency_key, :payload_json, :now
FROM events WHERE execution = :execution
RETURNING number;

-- name: event_of_key
-- An event by the idempotency key that its sender gave.
SELECT name, payload_json FROM events WHERE execution = :execution AND idempotency_key = :idempotency_key;

-- name: unused_event
-- The first event called :name that no node has used.
SELECT number, payload_json FROM events
WHERE execution = :execution AND name = :name AND node IS NULL ORDER BY number LIMIT 1;

-- name: kept_event_bytes
-- The size of an execution's events that no node has used.
SELECT coalesce(sum(length(CAST(payload_json AS BLOB))), 0) AS bytes FROM events
WHERE execution = :execution AND node IS NULL;

-- name: use_event
-- Store which node an event completes.
UPDATE events SET node = :node WHERE execution = :execution AND number = :number;

-- name: node_of_event
-- The first node that waits for an event called :name.
SELECT node FROM nodes
WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND status = 'WAITING' AND event = :name
ORDER BY node LIMIT 1;

-- name: make_ready
-- Turn a node whose dependencies are recorded into a task.
UPDATE nodes SET status = 'READY', due_ms = :now, task_bytes = :task_bytes WHERE node = :node AND status = 'PENDING';

-- name: retry_node
-- End a node's newest attempt without a result, and make the node a task again. An owned node waits for an owner, not
-- for a poll.
UPDATE nodes SET status = 'READY', due_ms = CASE WHEN owned THEN NULL ELSE :due_ms END,
                 failed_attempts = failed_attempts + :failed, lost_attempts = lost_attempts + :lost,
                 outcome = :outcome, attempt_error = :attempt_error, ended_ms = :now
WHERE node = :node AND attempts = :attempt
  AND (status IN ('RUNNING', 'READY') OR (status = 'WAITING' AND outcome = 'UNKNOWN'));

-- name: fail_node
-- End a node and its newest attempt without a result.
UPDATE nodes SET status = 'FAILED', error = :error,
                 failed_attempts = failed_attempts + :failed, lost_attempts = lost_attempts + :lost,
                 outcome = :outcome, attempt_error = :attempt_error, ended_ms = :now
WHERE node = :node AND attempts = :attempt
  AND (status IN ('RUNNING', 'READY') OR (status = 'WAITING' AND outcome = 'UNKNOWN'));

-- name: cancel_nodes
-- End the unfinished nodes of an execution, and their running attempts. Return the nodes.
UPDATE nodes SET status = 'CANCELLED', outcome = CASE outcome WHEN 'RUNNING' THEN 'CANCELLED' ELSE outcome END,
                 ended_ms = CASE outcome WHEN 'RUNNING' THEN :now ELSE ended_ms END
WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999
  AND status IN ('PENDING', 'READY', 'RUNNING', 'WAITING')
RETURNING execution, node_id, outcome, limits;

-- name: cancel_item_nodes
-- End the unfinished nodes of the items of an execution's MAP nodes, and their running attempts.
UPDATE nodes SET status = 'CANCELLED', outcome = CASE outcome WHEN 'RUNNING' THEN 'CANCELLED' ELSE outcome END,
                 ended_ms = CASE outcome WHEN 'RUNNING' THEN :now ELSE ended_ms END
WHERE node IN (SELECT 1000 * sequence FROM executions
               WHERE parent_node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND child_index IS NOT NULL
                 AND status = 'RUNNING')
  AND status IN ('READY', 'RUNNING');

-- name: cancel_items
-- End the running executions of the items of an execution's MAP nodes. Return their ids.
UPDATE executions SET status = 'CANCELLED', ended_ms = :now
WHERE parent_node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND child_index IS NOT NULL
  AND status = 'RUNNING'
RETURNING execution_id;

-- name: reopen_execution
-- Make an execution without a result run again.
UPDATE executions SET status = 'RUNNING', error = '', ended_ms = NULL
WHERE sequence = :execution AND status IN ('FAILED', 'CANCELLED');

-- name: reopen_waiting
-- Let some nodes without a result wait again. A node that had started executions waits for these executions. A node
-- whose effect is unknown waits for a person. If an attempt at a node with the effect ONCE ran when the execution
-- ended, its effect is unknown, too.
UPDATE nodes SET status = 'WAITING', due_ms = NULL, error = '', failed_attempts = 0, lost_attempts = 0,
                 attempt_error = CASE outcome WHEN 'CANCELLED' THEN 'the execution ended during the attempt'
                                              ELSE attempt_error END,
                 outcome = CASE outcome WHEN 'CANCELLED' THEN 'UNKNOWN' ELSE outcome END
WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND status IN ('FAILED', 'CANCELLED')
  AND (outcome = 'UNKNOWN' OR (outcome = 'CANCELLED' AND effect = 'ONCE')
       OR EXISTS (SELECT 1 FROM executions WHERE parent_node = node AND status IN ('FAILED', 'CANCELLED')));

-- name: repeating_parent
-- A PENDING node that would start its executions a second time.
SELECT node_id FROM nodes
WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND status = 'PENDING'
  AND EXISTS (SELECT 1 FROM executions WHERE parent_node = node) LIMIT 1;

-- name: children_without_result
-- The executions without a result that the nodes of an execution started.
SELECT sequence, execution_id, workflow_id, version_hash, child_index FROM executions
WHERE parent_node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND status IN ('FAILED', 'CANCELLED')
ORDER BY sequence;

-- name: reopen_item
-- Make the node of a MAP node's item READY again, with fresh counts. Return the size of its task.
UPDATE nodes SET status = 'READY', due_ms = :now, error = '', failed_attempts = 0, lost_attempts = 0
WHERE node = :node AND status IN ('FAILED', 'CANCELLED')
RETURNING task_bytes;

-- name: reopen_nodes
-- Make the nodes without a result PENDING again, with fresh counts. Their attempts stay in the history.
UPDATE nodes SET status = 'PENDING', due_ms = NULL, error = '', failed_attempts = 0, lost_attempts = 0,
                 effect = CASE WHEN effect = 'RECONCILE' AND outcome = 'CANCELLED' THEN 'MUST_RECONCILE'
                               ELSE effect END
WHERE node BETWEEN 1000 * :execution AND 1000 * :execution + 999 AND status IN ('FAILED', 'CANCELLED');

-- name: end_execution
-- End a running execution. Return the execution, with its input if the input is short.
UPDATE executions SET status = :status, error = :error, ended_ms = :now
WHERE sequence = :execution AND status = 'RUNNING'
RETURNING execution_id, workflow_id, version_hash, status, created_ms, ended_ms, error, idempotency_key,
          parent_node, child_index, NULL AS parent_execution_id, NULL AS parent_node_id,
          (SELECT json_group_object(name, value) FROM attributes WHERE execution = sequence) AS attributes,
          CASE WHEN length(CAST(input_json AS BLOB)) <= :max_inline THEN input_json ELSE '' END AS input_json;

-- name: renew_lease
-- Extend the lease of a task that a heartbeat names.
UPDATE nodes SET due_ms = CASE WHEN started_ms + timeout_ms < :lease_expires_ms
                              THEN started_ms + timeout_ms ELSE :lease_expires_ms END,
                 lease_loss = 'EXPIRED', streamed = TRUE, heartbeat_ms = :now
WHERE node = :node AND task_id = :task_id AND worker_id = :worker_id AND status = 'RUNNING';

-- name: store_progress
-- Store how far a task is.
UPDATE nodes SET progress_json = :progress_json
WHERE node = :node AND task_id = :task_id AND worker_id = :worker_id AND status = 'RUNNING';

-- name: resume_node
-- Give a node's newest attempt a new lease: the old lease ran out, and the worker is back. An attempt that became
-- UNKNOWN by a report or by its time limit is not resumed.
UPDATE nodes SET status = 'RUNNING', error = '', lost_attempts = lost_attempts - :lost, outcome = 'RUNNING',
                 attempt_error = '', ended_ms = NULL, lease_loss = 'EXPIRED', streamed = TRUE, heartbeat_ms = :now,
                 due_ms = CASE WHEN started_ms + timeout_ms < :lease_expires_ms
                              THEN started_ms + timeout_ms ELSE :lease_expires_ms END
WHERE node = :node AND attempts = :attempt
  AND (status = 'READY' OR (status = 'WAITING' AND outcome = 'UNKNOWN' AND lease_loss IS NOT NULL));

-- name: handed_out
-- The tasks that a worker has not reported and must have received by now. The columns are those of expired_lease.
-- Owned nodes are left out: an owner whose answer was lost starts the key again, and gets the same task.
SELECT node, node_id, task_id, attempts AS attempt, execution, worker_id, lease_loss, lost_attempts, version_hash,
       task_bytes, owned, started_ms, timeout_ms, failed_attempts, retry, effect, limits
FROM nodes
WHERE queue = '' AND worker_id = :worker_id AND NOT owned AND started_ms + task_bytes / :bytes_per_ms <= :now;

-- name: shorten_leases
-- A worker's connection broke: the worker loses its tasks unless it reconnects in time.
UPDATE nodes SET due_ms = CASE WHEN due_ms < :lease_expires_ms THEN due_ms ELSE :lease_expires_ms END, lease_loss = 'LOST'
WHERE queue = '' AND worker_id = :worker_id AND streamed;

-- name: restart_leases
-- The server was restarted: attempts are interrupted unless their workers reconnect in time.
UPDATE nodes SET due_ms = CASE WHEN started_ms + timeout_ms < :lease_expires_ms
                              THEN started_ms + timeout_ms ELSE :lease_expires_ms END,
                 lease_loss = 'INTERRUPTED'
WHERE queue = '' AND streamed = :streamed;

-- name: restart_owned_leases
-- The server was restarted: attempts of owners are interrupted unless their owners reconnect in time.
UPDATE nodes SET due_ms = :lease_expires_ms WHERE queue = '' AND owned;

-- name: end_leases
-- The process died with the server: its attempts are interrupted.
UPDATE nodes SET due_ms = :now, lease_loss = 'INTERRUPTED'
WHERE queue = '' AND substr(worker_id, 1, length(:process)) = :process;

-- name: restart_tasks
-- Make first attempts due that seem to be due later, because the clock was set back.
UPDATE nodes SET due_ms = :now WHERE queue IS NOT NULL AND status = 'READY' AND due_ms > :now AND attempts = 0;

-- name: waiting_retries
-- The retries that are not due yet.
SELECT node, retry, failed_attempts FROM nodes WHERE status = 'READY' AND attempts > 0 AND due_ms > :now;

-- name: restart_retry
-- Make a retry due at :latest, if it would be due later.
UPDATE nodes SET due_ms = :latest WHERE node = :node AND due_ms > :latest;

-- name: restart_waits
-- Let the waits begin again that seem to have begun later than now, because the clock was set back.
UPDATE nodes SET due_ms = :now + due_ms - started_ms, started_ms = :now
WHERE status = 'WAITING' AND node_type IN ('TIMER', 'EVENT', 'HUMAN_APPROVAL') AND started_ms > :now;

-- name: expired_leases
-- The nodes whose lease has run out, the earliest first.
SELECT node, execution FROM nodes WHERE queue = '' AND due_ms <= :now ORDER BY due_ms LIMIT :limit;

-- name: expired_lease
-- The attempt at a node, if its lease has run out.
SELECT node, node_id, task_id, attempts AS attempt, execution, worker_id, lease_loss, lost_attempts, version_hash,
       task_bytes, owned, started_ms, timeout_ms, failed_attempts, retry, effect, limits
FROM nodes WHERE node = :node AND status = 'RUNNING' AND due_ms <= :now;

-- name: next_lease
-- When the next lease runs out.
SELECT min(due_ms) AS due FROM nodes WHERE queue = '';

-- name: due_retries
-- The retries that have become due since :since.
SELECT version_hash, task_bytes FROM nodes
WHERE status = 'READY' AND attempts > 0 AND due_ms > :since AND due_ms <= :now;

-- name: next_retry
-- When the next retry becomes due.
SELECT min(due_ms) AS due FROM nodes WHERE status = 'READY' AND attempts > 0 AND due_ms > :now;

-- Retention (retention.py). A deletion runs one statement for each table. It deletes executions with consecutive
-- numbers.

-- name: oldest_executions
-- The executions that clients started, with numbers above :after, the oldest first. An execution that a node started is
-- pruned together with the node's execution.
SELECT sequence, status, idempotency_key, created_ms, ended_ms,
       EXISTS (SELECT 1 FROM executions AS children
               WHERE children.parent_node BETWEEN 1000 * executions.sequence AND 1000 * executions.sequence + 999)
       AS has_children
FROM executions WHERE sequence > :after AND parent_node IS NULL ORDER BY sequence LIMIT :limit;

-- name: descendants
-- The executions that the nodes of an execution started, those that their nodes started, and so on.
WITH RECURSIVE started (number) AS (
    SELECT sequence FROM executions WHERE parent_node BETWEEN 1000 * :execution AND 1000 * :execution + 999
    UNION ALL
    SELECT sequence FROM started JOIN executions ON parent_node BETWEEN 1000 * number AND 1000 * number + 999
)
SELECT number FROM started;

-- name: prune_events
-- Delete the events of executions.
DELETE FROM events WHERE execution BETWEEN :first AND :last;

-- name: prune_attributes
-- Delete the attributes of executions.
DELETE FROM attributes WHERE execution BETWEEN :first AND :last;

-- name: is_session
-- One row if the key of an owned execution is in [first, end), else no row. The query looks into each workflow, because
-- every index of keys begins with the workflow.
WITH RECURSIVE ids (id) AS (
    SELECT min(workflow_id) FROM workflow_versions
    UNION ALL
    SELECT (SELECT min(workflow_id) FROM workflow_versions WHERE workflow_id > id) FROM ids WHERE id IS NOT NULL
)
SELECT 1 FROM ids
JOIN executions ON workflow_id = id AND idempotency_key >= :first AND idempotency_key < :end
JOIN nodes ON node = 1000 * sequence
WHERE owned LIMIT 1;

-- name: executions_of_keys
-- The executions of all workflows whose keys are in [first, end).
WITH RECURSIVE ids (id) AS (
    SELECT min(workflow_id) FROM workflow_versions
    UNION ALL
    SELECT (SELECT min(workflow_id) FROM workflow_versions WHERE workflow_id > id) FROM ids WHERE id IS NOT NULL
)
SELECT sequence, status, ended_ms,
       EXISTS (SELECT 1 FROM executions AS children
               WHERE children.parent_node BETWEEN 1000 * executions.sequence AND 1000 * executions.sequence + 999)
       AS has_children
FROM ids JOIN executions ON workflow_id = id AND idempotency_key >= :first AND idempotency_key < :end;

-- name: prune_former_ids
-- Delete the ids of executions and of their tasks.
DELETE FROM former_ids WHERE id IN (
    SELECT execution_id FROM executions WHERE sequence BETWEEN :first AND :last
    UNION ALL
    SELECT task_id FROM nodes WHERE node BETWEEN 1000 * :first AND 1000 * :last + 999
    UNION ALL
    SELECT task_id FROM attempts WHERE node BETWEEN 1000 * :first AND 1000 * :last + 999);

-- name: prune_attempts
-- Delete the earlier attempts of executions.
DELETE FROM attempts WHERE node BETWEEN 1000 * :first AND 1000 * :last + 999;

-- name: prune_nodes
-- Delete the nodes of executions.
DELETE FROM nodes WHERE node BETWEEN 1000 * :first AND 1000 * :last + 999;

-- name: prune_executions
-- Delete ended executions.
DELETE FROM executions WHERE sequence BETWEEN :first AND :last;

-- name: note_pruned
-- Remember the number of a pruned execution, so that no later execution gets the same number.
UPDATE pruned SET highest = :number WHERE one = 1 AND highest < :number;
