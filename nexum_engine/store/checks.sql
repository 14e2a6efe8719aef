-- The engine's invariants. Each query returns a row for each violation. The column `what` describes the violation.
-- SQLite itself checks types, references and indexes, so no query here repeats these checks.

-- name: execution_id
SELECT 'execution ' || execution_id || ' has the wrong number: ' || sequence AS what FROM executions
WHERE execution_id NOT GLOB 'exec-' || sequence || '-*'
  AND NOT EXISTS (SELECT 1 FROM former_ids WHERE id = execution_id AND number = sequence);

-- name: task_id
SELECT 'task ' || task_id || ' belongs to the wrong node: ' || node AS what
FROM (SELECT node, task_id FROM nodes WHERE task_id IS NOT NULL UNION ALL SELECT node, task_id FROM attempts)
WHERE task_id NOT GLOB 'task-' || node || '-*'
  AND NOT EXISTS (SELECT 1 FROM former_ids WHERE id = task_id AND number = node);

-- name: former_id
SELECT 'the former id ' || id || ' belongs to no execution and no task' AS what FROM former_ids
WHERE NOT EXISTS (SELECT 1 FROM executions WHERE sequence = number AND execution_id = id)
  AND NOT EXISTS (SELECT 1 FROM nodes WHERE node = number AND task_id = id)
  AND NOT EXISTS (SELECT 1 FROM attempts WHERE node = number AND task_id = id);

-- name: one_execution_of_key
SELECT 'key ' || idempotency_key || ' of workflow ' || workflow_id || ' has ' || count(*)
       || ' executions that are RUNNING or COMPLETED, instead of one' AS what
FROM executions WHERE idempotency_key IS NOT NULL AND status IN ('RUNNING', 'COMPLETED')
GROUP BY workflow_id, idempotency_key HAVING count(*) > 1;

-- name: end_of_execution
SELECT 'execution ' || execution_id || ' is ' || status
       || CASE WHEN ended_ms IS NULL THEN ', but has no end time' ELSE ', but has an end time' END AS what
FROM executions WHERE (status = 'RUNNING') <> (ended_ms IS NULL);

-- name: ended_with_unfinished_nodes
SELECT 'execution ' || execution_id || ' is ' || executions.status || ', but its node ' || node_id || ' is '
       || nodes.status AS what
FROM nodes JOIN executions ON sequence = node / 1000
WHERE executions.status <> 'RUNNING' AND nodes.status IN ('PENDING', 'READY', 'RUNNING', 'WAITING');

-- name: completed_without_results
SELECT 'execution ' || execution_id || ' is COMPLETED, but its node ' || node_id || ' is ' || nodes.status AS what
FROM nodes JOIN executions ON sequence = node / 1000
WHERE executions.status = 'COMPLETED' AND nodes.status IN ('FAILED', 'CANCELLED');

-- name: failed_without_failed_node
SELECT 'execution ' || execution_id || ' is FAILED, but none of its nodes is' AS what FROM executions
WHERE status = 'FAILED' AND NOT EXISTS (
    SELECT 1 FROM nodes WHERE node BETWEEN 1000 * sequence AND 1000 * sequence + 999 AND nodes.status = 'FAILED');

-- name: running_without_unfinished_node
SELECT 'execution ' || execution_id || ' is RUNNING, but none of its nodes is unfinished' AS what FROM executions
WHERE status = 'RUNNING' AND NOT EXISTS (
    SELECT 1 FROM nodes WHERE node BETWEEN 1000 * sequence AND 1000 * sequence + 999
    AND nodes.status IN ('PENDING', 'READY', 'RUNNING', 'WAITING'));

-- name: result
SELECT 'node ' || node_id || ' of execution ' || execution_id || ' is ' || nodes.status
       || CASE WHEN output_json IS NULL THEN ', but has no output' ELSE ', but has an output' END AS what
FROM nodes JOIN executions ON sequence = node / 1000 WHERE (nodes.status = 'COMPLETED') <> (output_json IS NOT NULL);

-- name: version_of_node
SELECT 'node ' || node_id || ' of execution ' || execution_id || ' has another version than its execution: '
       || nodes.version_hash AS what
FROM nodes JOIN executions ON sequence = node / 1000 WHERE nodes.version_hash <> executions.version_hash;

-- name: due
SELECT 'node ' || node_id || ' of execution ' || execution_id || ' is ' || nodes.status
       || CASE nodes.status WHEN 'READY' THEN ', but is never handed out' WHEN 'WAITING' THEN ', but never ends'
                            ELSE ', but its lease never ends' END
       || ': it has no due time' AS what
FROM nodes JOIN executions ON sequence = node / 1000
WHERE due_ms IS NULL AND (nodes.status = 'RUNNING' OR (nodes.status = 'READY' AND NOT owned)
                          OR (nodes.status = 'WAITING' AND node_type = 'TIMER'));

-- name: child_without_parent
SELECT 'execution ' || execution_id || ' is RUNNING, but the node that started it is ' || nodes.status AS what
FROM executions JOIN nodes ON node = parent_node WHERE executions.status = 'RUNNING' AND nodes.status <> 'WAITING';

-- name: parent_without_children
SELECT 'node ' || node_id || ' of execution ' || execution_id
       || ' waits for executions that it started, but none is RUNNING' AS what
FROM nodes JOIN executions ON sequence = node / 1000
WHERE nodes.status = 'WAITING' AND node_type IN ('MAP', 'SUBWORKFLOW') AND NOT EXISTS (
    SELECT 1 FROM executions AS children WHERE children.parent_node = node AND children.status = 'RUNNING');

-- name: used_event
SELECT 'event ' || name || ' of execution ' || execution_id || ' was used by node ' || events.node
       || ', which is not a COMPLETED node of that execution' AS what
FROM events JOIN executions ON sequence = events.execution
WHERE events.node IS NOT NULL AND NOT EXISTS (
    SELECT 1 FROM nodes
    WHERE nodes.node = events.node AND nodes.node / 1000 = events.execution AND nodes.status = 'COMPLETED');

-- name: newest_attempt
SELECT 'node ' || node_id || ' of execution ' || execution_id || ' is ' || nodes.status || ', but its newest attempt is '
       || coalesce(outcome, 'missing') AS what
FROM nodes JOIN executions ON sequence = node / 1000
WHERE (nodes.status = 'RUNNING') <> (coalesce(outcome, '') = 'RUNNING')
   OR (nodes.status IN ('COMPLETED', 'WAITING') AND attempts > 0 AND node_type NOT IN ('TIMER', 'HUMAN_APPROVAL', 'EVENT')
       AND outcome <> CASE WHEN nodes.status = 'WAITING' AND node_type = 'EFFECT' THEN 'UNKNOWN' ELSE 'COMPLETED' END)
   OR (outcome = 'UNKNOWN' AND nodes.status NOT IN ('WAITING', 'CANCELLED'))
   OR (attempts > 0) <> (task_id IS NOT NULL);

-- name: effect
SELECT 'node ' || node_id || ' of execution ' || execution_id || ', of type ' || node_type || ', has the wrong effect: '
       || effect AS what
FROM nodes JOIN executions ON sequence = node / 1000
WHERE effect NOT IN ('ONCE', 'RECONCILE', 'MUST_RECONCILE') OR (effect IS NOT NULL AND node_type <> 'EFFECT');

-- name: earlier_attempts
SELECT 'node ' || node_id || ' of execution ' || execution_id || ' has ' || attempts || ' attempts, but '
       || (SELECT count(*) FROM attempts AS earlier WHERE earlier.node = nodes.node)
       || ' earlier attempts are stored' AS what
FROM nodes JOIN executions ON sequence = node / 1000
WHERE (SELECT count(*) FROM attempts AS earlier WHERE earlier.node = nodes.node AND attempt BETWEEN 1 AND attempts - 1)
      <> max(attempts - 1, 0)
   OR (node_type <> 'HUMAN_APPROVAL'  -- the table attempts has all attempts at such a node, as decisions
       AND EXISTS (SELECT 1 FROM attempts AS earlier WHERE earlier.node = nodes.node AND attempt >= nodes.attempts));

-- name: open_attempt
SELECT 'attempt ' || attempt || ' at node ' || node_id || ' of execution ' || execution_id || ' is ' || attempts.outcome
       || ', but a later attempt was handed out' AS what
FROM attempts JOIN nodes ON nodes.node = attempts.node JOIN executions ON sequence = nodes.node / 1000
WHERE attempts.outcome IN ('RUNNING', 'COMPLETED') AND node_type <> 'HUMAN_APPROVAL';

-- name: counts_of_attempts
SELECT 'node ' || node_id || ' of execution ' || execution_id || ' counts ' || failed_attempts || ' failed and '
       || lost_attempts || ' lost attempts of ' || attempts AS what
FROM nodes JOIN executions ON sequence = node / 1000
WHERE failed_attempts < 0 OR lost_attempts < 0 OR failed_attempts + lost_attempts > attempts;

-- name: pruned
SELECT 'the number of the last pruned execution is missing' AS what
WHERE NOT EXISTS (SELECT 1 FROM pruned WHERE one = 1);
