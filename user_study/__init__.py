"""Blind pairwise votes from people: design, assignment, exactly-once votes, a page to vote on, an export."""
