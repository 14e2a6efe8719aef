-- A random value that tells this database from others, whatever address a server uses for it. See Store.database_id.
ALTER TABLE nexum_schema ADD COLUMN database_id text NOT NULL DEFAULT replace(gen_random_uuid()::text, '-', '');
