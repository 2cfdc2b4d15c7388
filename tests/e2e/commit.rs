//! The last transaction of an operation fails, as on a full disk: what stood before still stands.

use std::path::Path;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{ConnectOptions, Connection};
use stead_tests::Worker;
use stead_tests::guest;

/// Has every transaction fail at its COMMIT in which a job turns its undoing to `launch` alone.
///
/// A foreign key that is only looked at when the transaction is committed stands for a disk that is
/// full at that moment.
const FAIL_AT_COMMIT: &str = "
CREATE TABLE test_parent (id BIGINT PRIMARY KEY);
CREATE TABLE test_child (parent BIGINT REFERENCES test_parent (id) DEFERRABLE INITIALLY DEFERRED);
CREATE TRIGGER test_turned AFTER UPDATE OF detail ON jobs
WHEN json_array_length(NEW.detail, '$.layers') = 0 AND json_array_length(NEW.detail, '$.launches') = 1
BEGIN
    INSERT INTO test_child VALUES (1);
END;
";
const NO_MORE: &str = "DROP TRIGGER test_turned; DROP TABLE test_child; DROP TABLE test_parent;";

fn run(database: &Path, statements: &'static str) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime");
    runtime.block_on(async {
        let options = SqliteConnectOptions::new().filename(database);
        let mut connection: SqliteConnection = options.connect().await.expect("open");
        sqlx::raw_sql(statements)
            .execute(&mut connection)
            .await
            .expect("run");
        connection.close().await.expect("close");
    });
}

#[test]
fn an_operation_whose_last_transaction_fails_keeps_the_vm_that_it_was_to_end() {
    let worker = Worker::with_own_store();
    worker.boot("web");
    guest::fill(&worker, "web");
    worker.ok(&["checkpoint", "create", "web", "--name", "before"]);
    let database = worker.data.join("stead.db");
    for args in [vec!["restore", "web", "before"], vec!["hibernate", "web"]] {
        let (pid, seen) = (worker.pid("web"), guest::look(&worker, "web"));
        run(&database, FAIL_AT_COMMIT);
        let error = worker.fails(&args, 1);
        assert!(
            error["found"]
                .as_str()
                .is_some_and(|found| found.contains("FOREIGN KEY")),
            "{error}"
        );
        run(&database, NO_MORE);
        worker.ok(&["ls"]);
        assert_eq!(worker.state("web"), "running", "{args:?}");
        assert_eq!(worker.pid("web"), pid, "{args:?}");
        assert_eq!(worker.qemus(), [pid], "{args:?}");
        let now = guest::look(&worker, "web");
        assert_eq!((&now.files, &now.memory), (&seen.files, &seen.memory));
        assert!(now.count > seen.count, "{args:?}: the guest stands still");
    }
    // Without the fault the same commands work.
    worker.ok(&["hibernate", "web"]);
    worker.ok(&["wake", "web"]);
    worker.ok(&["restore", "web", "before"]);
    guest::look(&worker, "web");
    worker.ok(&["verify"]);
}
