-- Run by the postgres image when its volume is new: users and permissions lie apart from the runs.
CREATE DATABASE mlflow_auth;
