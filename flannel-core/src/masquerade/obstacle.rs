//! Rules of others that stop what ours accept.
