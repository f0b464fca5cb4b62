"""What a hospital looks at before it joins."""
