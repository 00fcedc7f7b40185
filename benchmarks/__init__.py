"""What ConPaaS costs over doing the same by hand: ratios against floors that are measured in the same run."""
