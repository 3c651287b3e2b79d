-- What each role may do in the database, beside its owner: who makes the tables (`fraudctl migrate`), and runs this after.
--   psql -h HOST -U OWNER -d NAME -f deploy/grants.sql      asks for the password, or finds it in PGPASSFILE
-- The roles are made before, each with a password of its own: CREATE ROLE db_sink LOGIN; \password db_sink
-- The producer, the predictor and the alerter have none.

-- All of it or nothing
\set ON_ERROR_STOP on
BEGIN;

-- By default, everybody may connect and see what there is.
REVOKE ALL ON DATABASE :"DBNAME" FROM PUBLIC;
REVOKE ALL ON SCHEMA public FROM PUBLIC;

-- db_sink: stores, and loads each batch by way of a temporary table; sees whether the schema is up to date
GRANT CONNECT ON DATABASE :"DBNAME" TO db_sink;
GRANT TEMPORARY ON DATABASE :"DBNAME" TO db_sink;
GRANT USAGE ON SCHEMA public TO db_sink;
GRANT SELECT ON alembic_version TO db_sink;
GRANT SELECT ON transactions TO db_sink;
GRANT INSERT ON transactions TO db_sink;
GRANT UPDATE ON transactions TO db_sink;

-- labels: `fraudctl labels`; changes labels and nothing else, and cannot rewrite who changed what
GRANT CONNECT ON DATABASE :"DBNAME" TO labels;
GRANT TEMPORARY ON DATABASE :"DBNAME" TO labels;
GRANT USAGE ON SCHEMA public TO labels;
GRANT SELECT ON transactions TO labels;
GRANT UPDATE (is_fraud, validated_at, validated_by) ON transactions TO labels;
GRANT INSERT ON label_changes TO labels;

-- exporter: `fraudctl export`, `status` and `labels stats`; reads
GRANT CONNECT ON DATABASE :"DBNAME" TO exporter;
GRANT USAGE ON SCHEMA public TO exporter;
GRANT SELECT ON alembic_version TO exporter;
GRANT SELECT ON transactions TO exporter;

-- What a database's owner alone can give and take, PostgreSQL leaves as it is for others, with no more than a warning.
DO $$ BEGIN
  IF has_database_privilege('public', current_database(), 'CONNECT, TEMPORARY')
    OR has_schema_privilege('public', 'public', 'CREATE, USAGE')
    OR NOT has_database_privilege('exporter', current_database(), 'CONNECT')
  THEN RAISE 'the rights in this database are not changed: run this as its owner';
  END IF;
END $$;
COMMIT;
