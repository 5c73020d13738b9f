"""Commands of the command line, together by what they are about; `osmf.cli` puts them into one."""
