-- The rights of each role in the database. The owner creates the tables (`fraudctl migrate`) and then runs this file:
--   psql -h HOST -U OWNER -d NAME -f deploy/grants.sql      asks for the password, or reads it from PGPASSFILE
-- Create the roles first, each with its own password: CREATE ROLE db_sink LOGIN; \password db_sink
-- The producer, the predictor and the alerter need no role.

-- All of it or nothing
\set ON_ERROR_STOP on
BEGIN;

-- By default, every role may connect and list the tables.
REVOKE ALL ON DATABASE :"DBNAME" FROM PUBLIC;
REVOKE ALL ON SCHEMA public FROM PUBLIC;

-- db_sink: stores each batch through a temporary table, and checks whether the schema is up to date
GRANT CONNECT ON DATABASE :"DBNAME" TO db_sink;
GRANT TEMPORARY ON DATABASE :"DBNAME" TO db_sink;
GRANT USAGE ON SCHEMA public TO db_sink;
GRANT SELECT ON alembic_version TO db_sink;
GRANT SELECT ON transactions TO db_sink;
GRANT INSERT ON transactions TO db_sink;
GRANT UPDATE ON transactions TO db_sink;

-- labels: `fraudctl labels`; changes labels only, and cannot alter their history
GRANT CONNECT ON DATABASE :"DBNAME" TO labels;
GRANT TEMPORARY ON DATABASE :"DBNAME" TO labels;
GRANT USAGE ON SCHEMA public TO labels;
GRANT SELECT ON transactions TO labels;
GRANT UPDATE (is_fraud, validated_at, validated_by) ON transactions TO labels;
GRANT INSERT ON label_changes TO labels;

-- exporter: `fraudctl export`, `status` and `labels stats`; read-only
GRANT CONNECT ON DATABASE :"DBNAME" TO exporter;
GRANT USAGE ON SCHEMA public TO exporter;
GRANT SELECT ON alembic_version TO exporter;
GRANT SELECT ON transactions TO exporter;

-- When another role than the owner runs this, PostgreSQL only warns and changes nothing.
DO $$ BEGIN
  IF has_database_privilege('public', current_database(), 'CONNECT, TEMPORARY')
    OR has_schema_privilege('public', 'public', 'CREATE, USAGE')
    OR NOT has_database_privilege('exporter', current_database(), 'CONNECT')
  THEN RAISE 'the rights in this database are not changed: run this as its owner';
  END IF;
END $$;
COMMIT;
