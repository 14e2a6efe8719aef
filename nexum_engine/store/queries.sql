-- Every query of the store, by name. A dialect's module has what differs for its database.

-- name: latest_version
-- The version of a workflow that was registered last.
SELECT ir_json FROM workflow_versions WHERE workflow_id = :workflow_id ORDER BY sequence DESC LIMIT 1;

-- name: version
-- One version's definition.
SELECT ir_json FROM workflow_versions WHERE workflow_id = :workflow_id AND version_hash = :version_hash;

-- name: add_version
-- Register a version.
INSERT INTO workflow_versions (workflow_id, version_hash, ir_json, compatibility, registered_ms)
VALUES (:workflow_id, :version_hash, :ir_json, :compatibility, :now);

-- name: versions
-- A workflow's latest versions, the latest first, each with its running executions.
SELECT workflow_id, version_hash, compatibility, registered_ms, coalesce(running, 0) AS active_executions
FROM workflow_versions
LEFT JOIN (SELECT version_hash AS of_version, count(*) AS running FROM executions
           WHERE workflow_id = :workflow_id AND status = 'RUNNING' GROUP BY version_hash) ON of_version = version_hash
WHERE workflow_id = :workflow_id ORDER BY sequence DESC LIMIT :limit;

-- name: execution_of_key
-- The latest execution of an idempotency key.
SELECT execution_id, status, input_json FROM executions
WHERE workflow_id = :workflow_id AND idempotency_key = :idempotency_key ORDER BY sequence DESC LIMIT 1;

-- name: add_execution
-- Start an execution.
INSERT INTO executions (execution_id, workflow_id, version_hash, status, input_json, idempotency_key, created_ms)
VALUES (:execution_id, :workflow_id, :version_hash, 'RUNNING', :input_json, :idempotency_key, :now);

-- name: add_node
-- Add a node to a new execution.
INSERT INTO nodes (execution_id, node_id, position, node_type, dependencies, version_hash, status, ready_ms, task_bytes,
                   owned)
VALUES (:execution_id, :node_id, :position, :node_type, :dependencies, :version_hash, :status, :ready_ms, :task_bytes,
        :owned);

-- name: execution
-- One execution.
SELECT execution_id, workflow_id, version_hash, status, input_json, idempotency_key, created_ms, ended_ms, error
FROM executions WHERE execution_id = :execution_id;

-- name: execution_without_input
-- One execution without its input.
SELECT execution_id, workflow_id, version_hash, status, '' AS input_json, idempotency_key, created_ms, ended_ms, error
FROM executions WHERE execution_id = :execution_id;

-- name: sequence
-- An execution's number in the order of starts.
SELECT sequence FROM executions WHERE execution_id = :execution_id;

-- name: executions
-- The latest executions, newest first; an empty filter matches all.
SELECT execution_id, workflow_id, version_hash, status, '' AS input_json, idempotency_key, created_ms, ended_ms, error
FROM executions
WHERE (:workflow_id = '' OR workflow_id = :workflow_id) AND (:status = '' OR status = :status)
  AND (:before IS NULL OR sequence < :before)
ORDER BY sequence DESC LIMIT :limit;

-- name: executions_of_prefix
-- The latest executions of a workflow whose idempotency keys are in [first, end).
SELECT execution_id, workflow_id, version_hash, status, '' AS input_json, idempotency_key, created_ms, ended_ms, error
FROM executions
WHERE workflow_id = :workflow_id AND idempotency_key >= :first AND idempotency_key < :end
  AND (:status = '' OR status = :status)
  AND (:before IS NULL OR sequence < :before)
ORDER BY sequence DESC LIMIT :limit;

-- name: nodes
-- An execution's nodes with their outputs.
SELECT node_id, node_type, status, output_json, error FROM nodes
WHERE execution_id = :execution_id ORDER BY position;

-- name: node_states
-- An execution's nodes without their outputs.
SELECT node_id, status, dependencies FROM nodes WHERE execution_id = :execution_id ORDER BY position;

-- name: attempts
-- Every attempt of an execution.
SELECT node_id, attempt, worker_id, started_ms, ended_ms, outcome, error FROM attempts
WHERE execution_id = :execution_id ORDER BY attempt LIMIT :limit;

-- name: output_bytes
-- An upper bound of the size of an execution's outputs as one JSON object: each character of a name may be escaped.
SELECT coalesce(sum(length(CAST(output_json AS BLOB)) + 2 * length(CAST(node_id AS BLOB)) + 4), 0) AS bytes
FROM nodes WHERE execution_id = :execution_id;

-- name: input_sizes
-- The parts of the size of an execution's tasks: its input, under an empty name, and each recorded output.
SELECT '' AS node_id, length(CAST(input_json AS BLOB)) AS bytes FROM executions WHERE execution_id = :execution_id
UNION ALL
SELECT node_id, length(CAST(output_json AS BLOB)) FROM nodes WHERE execution_id = :execution_id AND status = 'COMPLETED';

-- name: attempt_sizes
-- The size of an execution's attempts.
SELECT coalesce(sum(length(error) + length(worker_id) + 100), 0) AS bytes FROM attempts
WHERE execution_id = :execution_id;

-- name: oldest_task
-- The task of a version that has been due the longest and is small enough for the worker. Its input only if it is short.
SELECT nodes.execution_id, node_id, node_type, dependencies, attempts, ready_ms, nodes.version_hash,
       workflow_id, idempotency_key, task_bytes,
       CASE WHEN task_bytes <= :max_inline THEN input_json END AS input_json
FROM nodes JOIN executions ON executions.execution_id = nodes.execution_id
WHERE nodes.version_hash = :version_hash AND nodes.status = 'READY' AND ready_ms <= :now AND task_bytes <= :max_bytes
ORDER BY ready_ms, nodes.rowid LIMIT 1;

-- name: oversized_task
-- A due task of a version that is too large for the worker.
SELECT execution_id, node_id, task_bytes FROM nodes
WHERE version_hash = :version_hash AND status = 'READY' AND ready_ms <= :now AND task_bytes > :max_bytes
ORDER BY ready_ms, rowid LIMIT 1;

-- name: owned_node
-- The node of an owned execution, with its newest attempt.
SELECT nodes.execution_id, nodes.node_id, node_type, dependencies, attempts, nodes.version_hash,
       nodes.status, owned, workflow_id, idempotency_key, input_json, task_bytes, task_id, worker_id
FROM nodes
JOIN executions ON executions.execution_id = nodes.execution_id
LEFT JOIN attempts ON attempts.execution_id = nodes.execution_id AND attempts.node_id = nodes.node_id
                  AND attempts.attempt = nodes.attempts
WHERE nodes.execution_id = :execution_id;

-- name: task_payload
-- What the input of a running task is made of.
SELECT attempts.execution_id, dependencies, input_json
FROM attempts
JOIN nodes ON nodes.execution_id = attempts.execution_id AND nodes.node_id = attempts.node_id
JOIN executions ON executions.execution_id = attempts.execution_id
WHERE task_id = :task_id;

-- name: say_why_waiting
-- Store in a READY node what it waits for.
UPDATE nodes SET error = :error
WHERE execution_id = :execution_id AND node_id = :node_id AND status = 'READY' AND error <> :error;

-- name: take_task
-- Hand a READY node out.
UPDATE nodes SET status = 'RUNNING', attempts = attempts + 1, error = ''
WHERE execution_id = :execution_id AND node_id = :node_id AND status = 'READY';

-- name: add_attempt
-- Record an attempt under its own task id.
INSERT INTO attempts (task_id, execution_id, node_id, attempt, worker_id, streamed, started_ms, outcome,
                      lease_expires_ms, lease_loss)
VALUES (:task_id, :execution_id, :node_id, :attempt, :worker_id, :streamed, :now, 'RUNNING',
        :lease_expires_ms, 'EXPIRED');

-- name: dependency_outputs
-- The recorded outputs of an execution.
SELECT node_id, output_json FROM nodes WHERE execution_id = :execution_id AND status = 'COMPLETED';

-- name: attempt
-- An attempt with its node and execution, whether it is the node's newest, and how many nodes are not recorded yet.
SELECT attempts.execution_id, attempts.node_id, attempts.attempt, attempts.worker_id, attempts.outcome, attempts.error,
       nodes.attempts AS newest_attempt, nodes.failed_attempts, nodes.owned,
       executions.status AS execution_status, executions.version_hash,
       (SELECT count(*) FROM nodes AS others
        WHERE others.execution_id = attempts.execution_id AND others.status <> 'COMPLETED') AS unrecorded
FROM attempts
JOIN nodes ON nodes.execution_id = attempts.execution_id AND nodes.node_id = attempts.node_id
JOIN executions ON executions.execution_id = attempts.execution_id
WHERE attempts.task_id = :task_id;

-- name: node_output
-- A node's recorded output.
SELECT output_json FROM nodes WHERE execution_id = :execution_id AND node_id = :node_id;

-- name: record_output
-- Record a node's result, once.
UPDATE nodes SET status = 'COMPLETED', output_json = :output_json, error = ''
WHERE execution_id = :execution_id AND node_id = :node_id AND status IN ('RUNNING', 'READY')
  AND attempts = :attempt;

-- name: end_attempt
-- Record how an attempt ended.
UPDATE attempts SET outcome = :outcome, error = :error, ended_ms = :now WHERE task_id = :task_id;

-- name: lose_attempt
-- Record the end of an attempt whose lease ran out, if it was still running.
UPDATE attempts SET outcome = :outcome, error = :error, ended_ms = :now
WHERE task_id = :task_id AND outcome = 'RUNNING';

-- name: make_ready
-- Turn a node whose dependencies are recorded into a task.
UPDATE nodes SET status = 'READY', ready_ms = :now, task_bytes = :task_bytes
WHERE execution_id = :execution_id AND node_id = :node_id AND status = 'PENDING';

-- name: retry_node
-- Make a node a task again after a failed or lost attempt. An owned node waits for an owner, not for a poll.
UPDATE nodes SET status = 'READY', ready_ms = CASE WHEN owned THEN NULL ELSE :ready_ms END,
                 failed_attempts = failed_attempts + :failed,
                 lost_attempts = lost_attempts + :lost
WHERE execution_id = :execution_id AND node_id = :node_id AND status IN ('RUNNING', 'READY')
  AND attempts = :attempt;

-- name: fail_node
-- End a node without a result.
UPDATE nodes SET status = 'FAILED', error = :error, failed_attempts = failed_attempts + :failed,
                 lost_attempts = lost_attempts + :lost
WHERE execution_id = :execution_id AND node_id = :node_id AND status IN ('RUNNING', 'READY');

-- name: cancel_nodes
-- End the unfinished nodes of an execution.
UPDATE nodes SET status = 'CANCELLED'
WHERE execution_id = :execution_id AND status IN ('PENDING', 'READY', 'RUNNING');

-- name: cancel_attempts
-- End the running attempts of an execution.
UPDATE attempts SET outcome = 'CANCELLED', ended_ms = :now
WHERE execution_id = :execution_id AND outcome = 'RUNNING';

-- name: end_execution
-- End a running execution.
UPDATE executions SET status = :status, error = :error, ended_ms = :now
WHERE execution_id = :execution_id AND status = 'RUNNING';

-- name: renew_lease
-- Extend the lease of a task that a heartbeat names.
UPDATE attempts SET lease_expires_ms = :lease_expires_ms, lease_loss = 'EXPIRED', streamed = 1
WHERE task_id = :task_id AND worker_id = :worker_id AND outcome = 'RUNNING';

-- name: resume_attempt
-- Give an attempt whose lease ran out a new lease: its worker is back.
UPDATE attempts SET outcome = 'RUNNING', error = '', ended_ms = NULL, lease_expires_ms = :lease_expires_ms,
                    lease_loss = 'EXPIRED', streamed = 1
WHERE task_id = :task_id;

-- name: resume_node
-- Take a node out of the queue: the attempt whose lease ran out is resumed.
UPDATE nodes SET status = 'RUNNING', error = '', lost_attempts = lost_attempts - :lost
WHERE execution_id = :execution_id AND node_id = :node_id AND status = 'READY';

-- name: handed_out
-- The tasks that a worker was handed, must have received by now, and has not reported. Same columns as expired_attempts.
-- Without owned nodes: an owner whose answer was lost starts the key again and gets the same task.
SELECT attempts.task_id, attempts.execution_id, attempts.node_id, attempts.attempt, attempts.worker_id,
       attempts.lease_loss, nodes.lost_attempts, nodes.version_hash, nodes.task_bytes, nodes.owned
FROM attempts JOIN nodes ON nodes.execution_id = attempts.execution_id AND nodes.node_id = attempts.node_id
WHERE attempts.worker_id = :worker_id AND attempts.outcome = 'RUNNING' AND NOT nodes.owned
  AND attempts.started_ms + nodes.task_bytes / :bytes_per_ms <= :now;

-- name: shorten_leases
-- A worker's connection broke: it loses its tasks unless it reconnects in time.
UPDATE attempts SET lease_expires_ms = min(lease_expires_ms, :lease_expires_ms), lease_loss = 'LOST'
WHERE worker_id = :worker_id AND streamed = 1 AND outcome = 'RUNNING';

-- name: restart_leases
-- The server was restarted: attempts are interrupted unless their workers reconnect in time.
UPDATE attempts SET lease_expires_ms = :lease_expires_ms, lease_loss = 'INTERRUPTED'
WHERE streamed = :streamed AND outcome = 'RUNNING';

-- name: restart_owned_leases
-- The server was restarted: attempts of owners are interrupted unless their owners reconnect in time.
UPDATE attempts SET lease_expires_ms = :lease_expires_ms
WHERE streamed = 1 AND outcome = 'RUNNING'
  AND EXISTS (SELECT 1 FROM nodes WHERE nodes.execution_id = attempts.execution_id
              AND nodes.node_id = attempts.node_id AND owned);

-- name: restart_tasks
-- Make every task due at :latest at the latest.
UPDATE nodes SET ready_ms = :latest WHERE status = 'READY' AND ready_ms > :latest;

-- name: expired_attempts
-- Attempts whose lease has run out, the earliest first.
SELECT attempts.task_id, attempts.execution_id, attempts.node_id, attempts.attempt, attempts.worker_id,
       attempts.lease_loss, nodes.lost_attempts, nodes.version_hash, nodes.task_bytes, nodes.owned
FROM attempts JOIN nodes ON nodes.execution_id = attempts.execution_id AND nodes.node_id = attempts.node_id
WHERE attempts.outcome = 'RUNNING' AND attempts.lease_expires_ms <= :now ORDER BY attempts.lease_expires_ms LIMIT :limit;

-- name: next_lease
-- When the next lease runs out.
SELECT min(lease_expires_ms) AS due FROM attempts WHERE outcome = 'RUNNING';

-- name: due_tasks
-- The tasks that are due by now and were not due before.
SELECT version_hash, task_bytes FROM nodes WHERE status = 'READY' AND ready_ms > :since AND ready_ms <= :now;

-- name: next_retry
-- When the next task becomes due.
SELECT min(ready_ms) AS due FROM nodes WHERE status = 'READY' AND ready_ms > :now;
