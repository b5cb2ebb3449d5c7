//! The auditor's own logic, on small traces of our making: good ones, and each way to break a promise.
