-- Marks by which the server recognizes its files. The server reads the marks directly from the file and from the
-- write-ahead log: SQLite would return the file's marks as the log has changed them. Each table has one row with one
-- BLOB.

-- Random bytes that never change.
CREATE TABLE file_mark (mark BLOB NOT NULL) STRICT;
INSERT INTO file_mark VALUES (randomblob(16));

-- The stamp of the newest log, and of the file that this log continues. See sqlite_stamp.py.
CREATE TABLE log_stamp (stamp BLOB NOT NULL) STRICT;
INSERT INTO log_stamp VALUES (zeroblob(33));
